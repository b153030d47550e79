{{- define "tulle.labels" -}}
app.kubernetes.io/part-of: tulle
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- end }}

{{- /*
The image of a part: the part's own value, else of image.registry by digest or tag, else of a development build. A release
that was installed without `image`, and is upgraded with --reuse-values, does not have that value, but the part's former
default, an image of a development build: it must not hide image.registry.
*/}}
{{- define "tulle.image" -}}
{{- $image := .root.Values.image | default dict -}}
{{- $own := (index .root.Values .part).image | default "" -}}
{{- if and $image.registry (eq $own (printf "tulle.local/%s:dev" .part)) -}}
{{- $own = "" -}}
{{- end -}}
{{- $digest := index ($image.digests | default dict) .part -}}
{{- if $own -}}
{{ $own }}
{{- else if and $digest (not $image.registry) -}}
{{ fail "image.digests needs image.registry: images of a development build have no digests" }}
{{- else if $digest -}}
{{ printf "%s/tulle-%s@%s" (trimSuffix "/" $image.registry) .part $digest }}
{{- else if $image.registry -}}
{{ printf "%s/tulle-%s:%s" (trimSuffix "/" $image.registry) .part ($image.tag | default .root.Chart.AppVersion) }}
{{- else -}}
{{ printf "tulle.local/%s:%s" .part ($image.tag | default "dev") }}
{{- end -}}
{{- end }}

// What readers in Go make of a path: `name=route` for each, and the port on the first line.
package main

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strings"
)

var (
	deleting = regexp.MustCompile(`^/v1/[^/]*:delete/?$`)
	api      = regexp.MustCompile(`^/api/v1/[^/]*/?$`)
)

func route(text string) string {
	switch {
	case text == "/admin" || strings.HasPrefix(text, "/admin/"):
		return "A"
	case deleting.MatchString(text):
		return "D"
	case text == "/metrics" || text == "/metrics/":
		return "E"
	case api.MatchString(text):
		return "P"
	}
	return "-"
}

func main() {
	// The route that the standard library's own multiplexer takes; it also shows where it redirects.
	mux := http.NewServeMux()
	for pattern, name := range map[string]string{"/admin/": "A", "/metrics": "E", "/api/v1/{name}": "P", "/": "-"} {
		mux.HandleFunc(pattern, func(answer http.ResponseWriter, _ *http.Request) { answer.Header().Set("route", name) })
	}
	names := map[string]string{"/admin/": "A", "/metrics": "E", "/api/v1/{name}": "P"}
	handler := func(answer http.ResponseWriter, request *http.Request) {
		_, pattern := mux.Handler(request)
		muxed := names[pattern]
		if muxed == "" {
			muxed = "-"
		}
		twice, err := url.PathUnescape(request.URL.Path)
		if err != nil {
			twice = ""
		}
		fmt.Fprintf(answer, "mux=%s path=%s clean=%s escaped=%s sent=%s twice=%s",
			muxed, route(request.URL.Path), route(path.Clean("/"+request.URL.Path)), route(request.URL.EscapedPath()),
			route(strings.Split(request.RequestURI, "?")[0]), route(path.Clean("/"+twice)))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	panic(http.Serve(listener, http.HandlerFunc(handler)))
}

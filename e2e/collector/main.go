// A collector for the tests of traces: the OTLP receiver of the OpenTelemetry Collector, as released, and for each span
// that it has decoded one line of JSON on standard output.
package main

import (
	"context"
	"encoding/json"
	"log"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/otlpreceiver"
	"go.uber.org/zap"
)

// The address of the receiver for OTLP over gRPC. Its receiver for HTTP stays off.
const endpoint = ":4317"

// A span, and the resource that has sent it. The key traceId tells these lines from those of the log.
type line struct {
	TraceID    string         `json:"traceId"`
	SpanID     string         `json:"spanId"`
	ParentID   string         `json:"parentSpanId"`
	State      string         `json:"traceState"`
	Flags      uint32         `json:"flags"`
	Kind       string         `json:"kind"`
	Name       string         `json:"name"`
	Start      uint64         `json:"startUnixNano"`
	End        uint64         `json:"endUnixNano"`
	Status     string         `json:"status"`
	Attributes map[string]any `json:"attributes"`
	Resource   map[string]any `json:"resource"`
}

// Writes spans. Requests of several sidecars come at the same time.
type printer struct {
	mutex sync.Mutex
	lines *json.Encoder
}

func (p *printer) consume(_ context.Context, traces ptrace.Traces) error {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for _, sender := range traces.ResourceSpans().All() {
		resource := sender.Resource().Attributes().AsRaw()
		for _, scope := range sender.ScopeSpans().All() {
			for _, span := range scope.Spans().All() {
				if err := p.lines.Encode(lineOf(span, resource)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func lineOf(span ptrace.Span, resource map[string]any) line {
	return line{
		TraceID:    span.TraceID().String(),
		SpanID:     span.SpanID().String(),
		ParentID:   span.ParentSpanID().String(),
		State:      span.TraceState().AsRaw(),
		Flags:      span.Flags(),
		Kind:       span.Kind().String(),
		Name:       span.Name(),
		Start:      uint64(span.StartTimestamp()),
		End:        uint64(span.EndTimestamp()),
		Status:     span.Status().Code().String(),
		Attributes: span.Attributes().AsRaw(),
		Resource:   resource,
	}
}

func run() error {
	stop, done := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer done()
	factory := otlpreceiver.NewFactory()
	config := factory.CreateDefaultConfig()
	settings := map[string]any{"protocols": map[string]any{"grpc": map[string]any{"endpoint": endpoint}}}
	if err := confmap.NewFromStringMap(settings).Unmarshal(&config); err != nil {
		return err
	}
	printer := &printer{lines: json.NewEncoder(os.Stdout)}
	next, err := consumer.NewTraces(printer.consume)
	if err != nil {
		return err
	}
	telemetry := componenttest.NewNopTelemetrySettings()
	if telemetry.Logger, err = zap.NewProduction(); err != nil {
		return err
	}
	of := receiver.Settings{
		ID:                component.NewID(factory.Type()),
		TelemetrySettings: telemetry,
		BuildInfo:         component.NewDefaultBuildInfo(),
	}
	traces, err := factory.CreateTraces(stop, of, config, next)
	if err != nil {
		return err
	}
	if err := traces.Start(stop, componenttest.NewNopHost()); err != nil {
		return err
	}
	<-stop.Done()
	return traces.Shutdown(context.Background())
}

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

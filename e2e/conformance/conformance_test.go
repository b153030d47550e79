// Package conformance runs the official conformance suite of the Gateway API. `cargo xtask conformance` compiles it.
package conformance

import (
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
)

func TestConformance(t *testing.T) {
	conformance.RunConformance(t)
}

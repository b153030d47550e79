// What kstatus computes of an object, for the tests of rollouts: the object comes as JSON on standard input, its status and
// the message as one line of JSON on standard output. Flux and cli-utils wait with the same library.
package main

import (
	"encoding/json"
	"log"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

type computed struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

func main() {
	var object unstructured.Unstructured
	if err := json.NewDecoder(os.Stdin).Decode(&object); err != nil {
		log.Fatalf("cannot read the object: %v", err)
	}
	result, err := status.Compute(&object)
	if err != nil {
		log.Fatalf("cannot compute the status: %v", err)
	}
	line := computed{Status: result.Status.String(), Message: result.Message}
	if err := json.NewEncoder(os.Stdout).Encode(line); err != nil {
		log.Fatal(err)
	}
}

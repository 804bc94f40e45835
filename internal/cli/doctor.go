package cli

import (
	"context"
	"net/http"
	"time"
)

// Diagnosis is one thing that `lockstep doctor` looked at.
type Diagnosis struct {
	// Name of what was looked at.
	Name string
	// Err is nil when it is well.
	Err error
	// Detail is what was found.
	Detail string
	// Remedy is what to do when it is not well.
	Remedy string
}

// doctorTime bounds the question to a server.
const doctorTime = 10 * time.Second

// AskServer looks for a running server, and reports whether one is ready. None is not an
// illness.
func AskServer(ctx context.Context, e *Env, server string) (d Diagnosis, ready bool) {
	client, err := NewClient(server, e.Getenv("LOCKSTEP_API_KEY"))
	if err != nil {
		return Diagnosis{Name: "server", Err: err, Remedy: "correct --server or LOCKSTEP_SERVER"}, false
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, doctorTime)
	defer cancel()
	var out struct {
		Checks []struct {
			Name   string `json:"name"`
			Ready  bool   `json:"ready"`
			Detail string `json:"detail"`
		} `json:"checks"`
	}
	err = client.call(ctx, http.MethodGet, "/readyz", nil, &out)
	switch {
	case isUnreachable(err):
		return Diagnosis{Name: "server", Detail: "none answers at " + server + " (start one with `lockstep serve`)"}, false
	case err != nil:
		return Diagnosis{Name: "server", Err: err, Remedy: "look at the server's log; /readyz names what it waits for"}, false
	}
	detail := "ready at " + server
	for _, c := range out.Checks {
		if c.Detail != "" {
			detail += "; " + c.Name + ": " + c.Detail
		}
	}
	return Diagnosis{Name: "server", Detail: detail}, true
}

// WriteDiagnoses prints what was found and returns the exit code.
func WriteDiagnoses(e *Env, all []Diagnosis) int {
	code := ExitOK
	for _, d := range all {
		mark := "ok  "
		if d.Err != nil {
			mark, code = "FAIL", ExitFailed
		}
		e.printf("%s  %-14s", mark, d.Name)
		if d.Detail != "" {
			e.printf(" %s", d.Detail)
		}
		if d.Err != nil {
			e.printf(" %s", d.Err)
		}
		e.printf("\n")
		if d.Err != nil && d.Remedy != "" {
			e.printf("      to do: %s\n", d.Remedy)
		}
	}
	return code
}

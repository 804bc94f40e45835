package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func TestGodocIsDeterministic(t *testing.T) {
	t.Parallel()
	var a, b bytes.Buffer
	for _, out := range []*bytes.Buffer{&a, &b} {
		if err := run([]string{"-packages", "errors,net/http"}, out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Error("two runs differ")
	}
	kinds, ids := map[string]int{}, map[string]line{}
	last := ""
	for _, raw := range strings.Split(strings.TrimSpace(a.String()), "\n") {
		var l line
		if err := json.Unmarshal([]byte(raw), &l); err != nil {
			t.Fatal(err)
		}
		if l.ID <= last {
			t.Errorf("%s after %s", l.ID, last)
		}
		last = l.ID
		kinds[l.Metadata.Kind]++
		ids[l.ID] = l
	}
	for _, kind := range []string{"package", "func", "type", "method", "var"} {
		if kinds[kind] == 0 {
			t.Errorf("no document of kind %s", kind)
		}
	}
	do := ids["net/http.Client.Do"]
	if do.Metadata.Package != "net/http" || do.Metadata.Symbol != "Client.Do" ||
		!strings.HasPrefix(do.Text, "# method net/http.Client.Do\n\n```go\nfunc (c *Client) Do(req *Request) (*Response, error)\n```\n\nDo sends an HTTP request") {
		t.Errorf("Client.Do: %+v", do)
	}
	if !ids["errors.As"].Metadata.Example {
		t.Error("errors.As has an example")
	}
	if err := run([]string{"-packages", "no/such/package"}, &a); err == nil {
		t.Error("an unknown package is no error")
	}
}

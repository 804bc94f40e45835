package cli

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
)

// explainRemote asks the server for everything both stores know about one id.
func explainRemote(ctx context.Context, e *Env, client *Client, o ReconcileOptions) int {
	q := url.Values{"id": {o.ExplainID}}
	if o.Request.Collection != "" {
		q.Set("collection", o.Request.Collection)
	}
	var raw json.RawMessage
	err := e.patiently(ctx, 3, func() error {
		return client.call(ctx, http.MethodGet, "/admin/explain?"+q.Encode(), nil, &raw)
	})
	if err != nil {
		return e.failure(ctx, "reconcile", err)
	}
	e.printf("%s\n", raw)
	return ExitOK
}

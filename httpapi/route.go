package httpapi

import (
	"net/http"
	"time"

	"github.com/labstack/echo/v4"
)

// route is one row of the route table: everything that the outside of a handler depends on.
type route struct {
	method, path string
	scope        Scope
	flavour      flavour
	handler      echo.HandlerFunc
	// slow routes write, wait for indexing or embed in bulk, and have the longer time limit.
	slow bool
	// stream routes read application/x-ndjson without limits on the whole.
	stream bool
	// quiet routes are asked by machines all the time: not counted against the concurrency
	// limit, and logged at debug level only.
	quiet bool
}

func (rt *route) timeout(c Config) time.Duration {
	if rt.slow {
		return c.IngestTimeout
	}
	return c.Timeout
}

// routeTable lists every route. openapi.yaml must list the same (tested), with a trailing
// wildcard written as {id}.
func (s *Server) routeTable() []*route {
	const (
		get, post, patch, del = http.MethodGet, http.MethodPost, http.MethodPatch, http.MethodDelete
	)
	return []*route{
		{method: post, path: "/documents", scope: Write, slow: true, stream: true, handler: s.postDocuments},
		{method: get, path: "/documents", scope: Read, handler: s.listDocuments},
		{method: get, path: "/documents/*", scope: Read, handler: s.getDocument},
		{method: patch, path: "/documents/*", scope: Write, slow: true, handler: s.patchDocument},
		{method: del, path: "/documents/*", scope: Write, slow: true, handler: s.deleteDocument},

		{method: get, path: "/collections", scope: Read, handler: s.listCollections},
		{method: post, path: "/collections", scope: Write, slow: true, handler: s.createCollection},
		{method: get, path: "/collections/:name", scope: Read, handler: s.getCollection},
		{method: post, path: "/collections/:name", scope: Write, slow: true, handler: s.createCollection},
		{method: del, path: "/collections/:name", scope: Write, slow: true, handler: s.deleteCollection},

		{method: post, path: "/search", scope: Read, handler: s.search},

		{method: post, path: "/embed", scope: Read, slow: true, handler: s.embed},
		{method: post, path: "/embed_all", scope: Read, flavour: tei, slow: true, handler: s.teiEmbedAll},
		{method: post, path: "/embed_sparse", scope: Read, flavour: tei, slow: true, handler: s.teiEmbedSparse},
		{method: post, path: "/tokenize", scope: Read, flavour: tei, handler: s.teiTokenize},
		{method: get, path: "/info", scope: Read, flavour: tei, handler: s.teiInfo},
		{method: post, path: "/v1/embeddings", scope: Read, flavour: openAI, slow: true, handler: s.openAIEmbeddings},
		{method: get, path: "/v1/models", scope: Read, flavour: openAI, handler: s.openAIModels},
		{method: get, path: "/v1/models/:model", scope: Read, flavour: openAI, handler: s.openAIModel},

		{method: get, path: "/admin/consistency", scope: Admin, handler: s.getConsistency},
		{method: get, path: "/admin/reconcile", scope: Admin, handler: s.listRuns},
		{method: post, path: "/admin/reconcile", scope: Admin, handler: s.startRun},
		{method: get, path: "/admin/reconcile/:run_id", scope: Admin, handler: s.getRun},
		{method: del, path: "/admin/reconcile/:run_id", scope: Admin, handler: s.cancelRun},
		{method: get, path: "/admin/explain", scope: Admin, handler: s.explain},
		{method: post, path: "/admin/rollback", scope: Admin, handler: s.resolveRollback},
		{method: get, path: "/admin", scope: Admin, flavour: page, handler: s.adminPage},
		{method: post, path: "/admin", scope: Admin, flavour: page, handler: s.adminAction},

		{method: get, path: "/healthz", scope: Public, quiet: true, handler: s.healthz},
		{method: get, path: "/readyz", scope: Public, quiet: true, handler: s.readyz},
		{method: get, path: "/health", scope: Public, quiet: true, handler: s.readyz},
		{method: get, path: "/metrics", scope: Read, quiet: true, handler: s.serveMetrics},
		{method: get, path: "/openapi.json", scope: Public, handler: s.serveOpenAPI},
		{method: get, path: "/docs", scope: Public, flavour: page, handler: s.docsPage},
		{method: get, path: "/", scope: Public, flavour: page, handler: s.root},
	}
}

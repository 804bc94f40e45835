package httpapi

import (
	"context"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// Documents is how the API writes and reads documents. Methods block until the ledger has
// committed (or, with wait, until the version serves) or ctx ends; errors are corpus kinds.
type Documents interface {
	// Ingest answers one result for each document, in order. An error means that nothing was
	// accepted.
	Ingest(ctx context.Context, req corpus.IngestRequest) ([]corpus.DocumentResult, error)
	// Patch replaces a document's metadata; nothing is embedded again.
	Patch(ctx context.Context, collection, id string, md corpus.Metadata, wait bool) (corpus.DocumentResult, error)
	// Delete is invisible to search when it returns.
	Delete(ctx context.Context, collection, id string, wait bool) (corpus.DocumentResult, error)
	// Document returns a live document with its chunks.
	Document(ctx context.Context, collection, id string) (corpus.DocumentView, error)
	// Documents lists by external id after the given one; next is empty on the last page.
	Documents(ctx context.Context, collection string, limit int, after string) (page []corpus.DocumentView, next string, err error)
}

// Collections is how the API manages collections.
type Collections interface {
	CreateCollection(ctx context.Context, name string, s corpus.Settings) (corpus.CollectionView, error)
	Collection(ctx context.Context, name string) (corpus.CollectionView, error)
	Collections(ctx context.Context) ([]corpus.CollectionView, error)
	DeleteCollection(ctx context.Context, name string) error
}

// Ingester is the write side of the service.
type Ingester interface {
	Documents
	Collections
}

// Searcher answers queries. SearchBatch answers one response for each request, in order.
type Searcher interface {
	Search(ctx context.Context, req corpus.SearchRequest) (corpus.SearchResponse, error)
	SearchBatch(ctx context.Context, reqs []corpus.SearchRequest) ([]corpus.SearchResponse, error)
}

// Embedder computes vectors. Embed returns one Embedding for each input, in order; an input
// that fails alone carries its own Err. What it returns belongs to the caller.
type Embedder interface {
	Embed(ctx context.Context, req corpus.EmbedRequest) ([]corpus.Embedding, error)
	Spec() corpus.ModelSpec
	// Tokens returns the byte spans of the text's tokens, special tokens excluded.
	Tokens(ctx context.Context, text string) ([]corpus.TokenSpan, error)
	// Tokenize returns the text's token ids, special tokens included, not truncated.
	Tokenize(ctx context.Context, text string) ([]uint32, error)
}

// Reconciler compares the stores. Runs go on after Start returned.
type Reconciler interface {
	Start(ctx context.Context, req corpus.ReconcileRequest) (corpus.ID, error)
	Run(ctx context.Context, id corpus.ID) (corpus.RunReport, error)
	Cancel(ctx context.Context, id corpus.ID) error
	// Latest returns the last verdict of the named collection, or of all for "".
	Latest(ctx context.Context, collection string) ([]corpus.CollectionReport, error)
	// History returns the newest runs first.
	History(ctx context.Context, collection string, limit int) ([]corpus.RunReport, error)
	// Explain gathers everything both stores know about a chunk's, a document's or an external id.
	Explain(ctx context.Context, query, collection string) (corpus.Explanation, error)
	// AdoptRollback and DiscardRollback end the stop of a collection whose Postgres was rolled back.
	AdoptRollback(ctx context.Context, collection string) error
	DiscardRollback(ctx context.Context, collection string) error
}

// Check is one thing the service needs in order to answer.
type Check struct {
	// Name of the component: model, postgres, qdrant.
	Name string
	// Err is nil when it answers. Its corpus detail is shown; any other text is only logged.
	Err error
	// Detail adds what a person wants to know, such as the version that answered.
	Detail string
}

// Health asks every component once. It returns by the time ctx ends.
type Health interface {
	Checks(ctx context.Context) []Check
}

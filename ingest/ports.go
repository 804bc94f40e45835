package ingest

import (
	"context"
	"time"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// All methods below block until the store answered or ctx ended, are safe for concurrent use
// and return errors of corpus kinds: Unavailable and Overloaded mean that the effect is unknown
// or did not happen, and that the same call may be made again.

// Acceptor records what callers want.
type Acceptor interface {
	// Unchanged compares documents with the ledger without a lock; see corpus.NeedsChunks.
	Unchanged(ctx context.Context, collection corpus.ID, docs []corpus.PreparedDocument) ([]corpus.Accepted, error)
	// Accept records documents with different ids in one transaction and claims work of theirs.
	Accept(ctx context.Context, collection corpus.ID, docs []corpus.PreparedDocument, lease corpus.Lease) ([]corpus.Accepted, []corpus.Entry, error)
	// DeleteDocument makes a document invisible; NotFound document_not_found.
	DeleteDocument(ctx context.Context, collection corpus.ID, externalID string) (corpus.DocumentProgress, error)
	// PatchDocument replaces metadata; NotFound document_not_found.
	PatchDocument(ctx context.Context, collection corpus.ID, externalID string, md corpus.Metadata) (corpus.Accepted, error)
}

// Catalogue holds the collections.
type Catalogue interface {
	ResolveCollection(ctx context.Context, name string) (corpus.Collection, corpus.Index, error)
	// EnsureCollection creates the collection if there is none; created says so.
	EnsureCollection(ctx context.Context, name string, s corpus.Settings, layout corpus.Layout, fingerprint string) (c corpus.Collection, ix corpus.Index, created bool, err error)
	DeleteCollection(ctx context.Context, name string) error
	CollectionView(ctx context.Context, name string) (corpus.CollectionView, error)
	Collections(ctx context.Context) ([]corpus.CollectionView, error)
}

// Reader shows documents as the ledger knows them.
type Reader interface {
	Document(ctx context.Context, collection corpus.ID, externalID string) (corpus.DocumentView, error)
	Documents(ctx context.Context, collection corpus.ID, limit int, after string) (page []corpus.DocumentView, next string, err error)
	// Progress tells where documents stand, in the order asked for.
	Progress(ctx context.Context, collection corpus.ID, docs []corpus.ID) ([]corpus.DocumentProgress, error)
}

// Queue hands out unsettled entries and takes back what became of them.
type Queue interface {
	Claim(ctx context.Context, index corpus.ID, lease corpus.Lease) ([]corpus.Entry, error)
	Renew(ctx context.Context, index corpus.ID, entries []corpus.Entry, until time.Duration) error
	// Settle records results and switches versions; the progress covers all their documents.
	Settle(ctx context.Context, ix corpus.Index, results []corpus.EntryResult) ([]corpus.DocumentProgress, error)
	// RaiseMetadata gives documents a meta_version above what their points were seen to hold.
	RaiseMetadata(ctx context.Context, collection corpus.ID, seen map[corpus.ID]int64) error
}

// Graveyard holds dead entries until their points are known to be gone.
type Graveyard interface {
	ClaimDead(ctx context.Context, index corpus.ID, lease corpus.Lease) ([]corpus.ID, error)
	// Confirm records what was read absent and what is to be tried again; it returns the documents
	// concerned.
	Confirm(ctx context.Context, index, token corpus.ID, absent, again []corpus.ID, delay time.Duration, why string) ([]corpus.ID, error)
	ClaimTombs(ctx context.Context, index corpus.ID, grace time.Duration, lease corpus.Lease) ([]corpus.ID, error)
	Purge(ctx context.Context, ix corpus.Index, token corpus.ID, ids []corpus.ID) (purged int, err error)
}

// StampBook knows the stamps that the ledger issued.
type StampBook interface {
	// StampFits says why an index's stamp contradicts the ledger, or "".
	StampFits(ctx context.Context, ix corpus.Index, st corpus.Stamp) (string, error)
}

// IndexBook holds the life of indexes.
type IndexBook interface {
	Indexes(ctx context.Context) ([]corpus.LiveIndex, error)
	IndexReady(ctx context.Context, index corpus.ID) error
	BuildIndex(ctx context.Context, collection corpus.ID, fingerprint string, layout corpus.Layout) (corpus.Index, error)
	SwitchIndex(ctx context.Context, building corpus.Index) (switched bool, err error)
}

// Clearer removes what is over, and makes up for switches that nobody tested.
type Clearer interface {
	RetiredIndexes(ctx context.Context) ([]corpus.Index, error)
	ForgetIndex(ctx context.Context, index corpus.ID) error
	ClearCollections(ctx context.Context) error
	Sweep(ctx context.Context, collection, after corpus.ID, limit int) (moved []corpus.DocumentProgress, next corpus.ID, err error)
}

// Ledger is all that this room needs from Postgres.
type Ledger interface {
	Acceptor
	Catalogue
	Reader
	Queue
	Graveyard
	StampBook
	IndexBook
	Clearer
}

// PointWriter writes points. nil means that the index completed the write; a PartialError names
// what is known. Only ReadPoints tells what a point holds.
type PointWriter interface {
	// InsertPoints leaves points that exist as they are.
	InsertPoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error
	// RewritePoints replaces points unless they hold a higher meta_version.
	RewritePoints(ctx context.Context, ix corpus.Index, pts []corpus.Point) error
	// SetMetadata replaces metadata unless an equal or a higher meta_version is held.
	SetMetadata(ctx context.Context, ix corpus.Index, writes []corpus.MetadataWrite) error
	// ReadPoints returns those points that exist, in any order.
	ReadPoints(ctx context.Context, ix corpus.Index, ids []corpus.ID, withVectors bool) ([]corpus.PointState, error)
}

// PointRemover deletes points by id; ids without a point are fine. The stamp tells whether the
// ledger may have points deleted at all; ok is false where there is none yet.
type PointRemover interface {
	ReadStamp(ctx context.Context, ix corpus.Index) (st corpus.Stamp, ok bool, err error)
	DeletePoints(ctx context.Context, ix corpus.Index, ids []corpus.ID) error
}

// IndexMaker creates and drops Qdrant collections. Creating one that exists alike and dropping
// one that does not exist are fine.
type IndexMaker interface {
	CreateIndex(ctx context.Context, ix corpus.Index) error
	DropIndex(ctx context.Context, ix corpus.Index) error
}

// Index is all that this room needs from the vector index.
type Index interface {
	PointWriter
	PointRemover
	IndexMaker
}

// Embedder computes vectors and counts tokens. Embed answers one Embedding for each input, in
// order, each with an Err of its own where that input alone failed.
type Embedder interface {
	Embed(ctx context.Context, req corpus.EmbedRequest) ([]corpus.Embedding, error)
	Spec() corpus.ModelSpec
	// Tokens returns the byte spans of the text's tokens.
	Tokens(ctx context.Context, text string) ([]corpus.TokenSpan, error)
}

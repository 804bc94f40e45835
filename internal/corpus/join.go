package corpus

import "time"

// JoinRequest asks the ledger what candidates of an index are worth, in one statement, so
// that everything it answers is one moment's truth.
type JoinRequest struct {
	// Collection and Name, and the Index that proposed the candidates: the answer says
	// whether they still belong together.
	Collection ID
	Name       string
	Index      ID
	// Candidates, each at most once.
	Candidates []ID
	// Texts and Metadata say whether these are wanted.
	Texts, Metadata bool
	// Context is how many chunks before and after each are wanted, with their texts.
	Context int
}

// JoinState is what the ledger says about a candidate.
type JoinState uint8

// The states. Only a live candidate may be shown.
const (
	// JoinUnknown: the ledger has no such chunk in the collection.
	JoinUnknown JoinState = iota
	// JoinDead: no version that serves holds it, and none ever will.
	JoinDead
	// JoinWaiting: its version does not serve yet.
	JoinWaiting
	// JoinLive: the serving version of a document that is not deleted holds it.
	JoinLive
)

// JoinedChunk is one candidate's answer. All but ID, State and SwitchedAgo is set for live ones
// only.
type JoinedChunk struct {
	ID    ID
	State JoinState
	// SwitchedAgo is how long before the join its document, if that lives, moved to the version
	// that serves; 0 if that was more than an hour ago.
	SwitchedAgo time.Duration
	// Document is the place of its document in Joined.Documents.
	Document int
	// Ordinal of the chunk in the serving version, from 0.
	Ordinal       int
	Text          string
	Before, After []Neighbour
}

// JoinedDocument is a document some live candidate belongs to, as its serving version has it.
type JoinedDocument struct {
	ID         ID
	ExternalID string
	Version    int64
	Metadata   Metadata
}

// Joined is the ledger's answer to a [JoinRequest].
type Joined struct {
	// Serving is false when the index no longer serves the collection of that name: then the
	// rest says nothing, and the search must begin again.
	Serving   bool
	Documents []JoinedDocument
	// Chunks has one entry for each candidate, in the order of the request.
	Chunks []JoinedChunk
}

// LikeChunk is one chunk of the document whose neighbours a search wants.
type LikeChunk struct {
	ID   ID
	Text string
	// Vectors its caller brought, or nil: the index has them.
	Vectors *Vectors
}

// LikeDocument is the serving version of the document whose neighbours a search wants.
type LikeDocument struct {
	ID ID
	// Chunks, evenly taken from the document where it has more than were asked for.
	Chunks []LikeChunk
}

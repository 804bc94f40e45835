package corpus

// LiveIndex is an index that is written to.
type LiveIndex struct {
	Index
	CollectionName string
	// Ready: its Qdrant collection is known to exist. Until then it may be created; afterwards
	// one that is gone was lost, and nobody creates it again.
	Ready bool
	// Stopped: evidence of a rollback stands, and no delete may run in the collection.
	Stopped bool
}

package corpus

// Advice explains a finding to the person who has to act on it. It is shown by the command
// line, by the admin page and in the documentation, in the same words.
type Advice struct {
	// Meaning says what is wrong.
	Meaning string
	// Cause says how it usually comes about.
	Cause string
	// Repair says what a repairing run does, or what a person has to do where it does nothing.
	Repair string
	// Manual is true where no run repairs it; Partly, where one repairs some and the rest is a
	// person's to decide.
	Manual, Partly bool
}

var advice = map[FindingKind]Advice{
	Missing: {
		Meaning: "Postgres says the chunk is indexed, but the index has no such point, so no search can find it.",
		Cause:   "The index lost a write or was restored from an older snapshot, or somebody deleted points from it directly.",
		Repair:  "Embeds the chunk again (or takes the vectors its caller brought), writes the point whole and reads it back.",
	},
	Orphan: {
		Meaning: "The index holds a point of ours whose chunk is dead in Postgres or unknown to it. Searches hide it, at the price of a slot.",
		Cause:   "A write arrived after its document was deleted or replaced, or the index was restored from an older snapshot.",
		Repair:  "Records the id as dead in Postgres, then deletes the point by its id and confirms that it is gone. The brake counts these.",
	},
	Foreign: {
		Meaning: "The index holds a point without an owner, or one that another Lockstep installation wrote.",
		Cause:   "Another program or installation writes into this Qdrant collection.",
		Repair:  "Nothing by itself. Find the writer; then delete its points by naming the owner: --repair --delete-foreign OWNER (or none).",
		Manual:  true,
	},
	StalePayload: {
		Meaning: "The point's copy of the metadata, or the document it names, is not what Postgres holds. Filters on it may miss the document.",
		Cause:   "A metadata change did not reach the index, or somebody changed payloads directly.",
		Repair:  "Overwrites the payload, guarded so that a newer one is never replaced, and reads it back.",
	},
	CorruptVector: {
		Meaning: "The point's vector has the wrong size, is not finite, is zero, or differs from the checksum written with it.",
		Cause:   "Damage on disk, a migration that changed vectors, or a client that overwrote the point.",
		Repair:  "Writes the point again, whole, from the chunk's text or from the vectors its caller brought.",
	},
	Stuck: {
		Meaning: "A write has waited longer than it should, or was given up after many attempts.",
		Cause:   "A chunk that the model or the index refuses (see its last error), or no instance is running its workers.",
		Repair:  "Queues the write again with its attempts reset. If it comes back, GET /documents/{id} shows the error.",
	},
	ConfigDrift: {
		Meaning: "The Qdrant collection is not configured as it was created: vector size, distance, named vectors or payload indexes differ.",
		Cause:   "Somebody changed or recreated the collection by hand, or dropped it while it was being created.",
		Repair:  "Adds payload indexes that are missing. Else nothing: a guess could destroy data. Undo the change in Qdrant, or delete the Qdrant collection; it is then built again under a new name.",
		Partly:  true,
	},
	LostIndex: {
		Meaning: "The Qdrant collection that serves this collection is gone.",
		Cause:   "It was deleted, or Qdrant started on an empty disk, or QDRANT_URL points at another server.",
		Repair:  "Builds the index again from Postgres under a new name. Check QDRANT_URL first.",
	},
	OrphanIndex: {
		Meaning: "Qdrant has a collection with our prefix that Postgres does not know, or had dropped. It costs memory and serves nobody.",
		Cause:   "A request to create it arrived after it was dropped; Postgres was restored from an older backup; or a creation was interrupted.",
		Repair:  "Drops one whose name Postgres remembers as dropped. Else nothing: if no other installation uses it, delete it in Qdrant.",
		Partly:  true,
	},
	RolledBack: {
		Meaning: "The index holds writes that this Postgres does not remember making: Postgres was restored from an older backup, or it is the wrong one.",
		Cause:   "A restore or a failover that lost transactions, or a wrong DATABASE_URL.",
		Repair:  "Nothing is deleted until a person decides: lockstep reconcile --collection NAME --rollback adopt (this Postgres is right; what it does not know is deleted by the next repair) or discard (build the index again). docs/reconcile.md has the steps.",
		Manual:  true,
	},
}

// Advice returns what a person has to know about findings of this kind.
func (k FindingKind) Advice() Advice { return advice[k] }

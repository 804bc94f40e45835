package corpus

import "time"

// MaxColBERTValues is the most values (rows times columns) a point's ColBERT vector may have:
// Qdrant refuses larger multivectors. A chunk that exceeds it fails alone and says so.
const MaxColBERTValues = 1 << 20

// Stamp is the mark an installation leaves in an index: who owns it, and a nonce renewed
// every minute, by which a clone or an old copy of either store is told from the original.
type Stamp struct {
	Installation ID
	Nonce        ID
	At           time.Time
}

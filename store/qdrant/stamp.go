package qdrant

import (
	"time"

	"github.com/google/uuid"
	qc "github.com/qdrant/go-client/qdrant"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// The stamp is one object under a key that points of chunks do not have. It carries neither
// owner nor bucket, so that no count of ours sees it.
const keyStamp = "_stamp"

func encodeStamp(s corpus.Stamp) map[string]*qc.Value {
	return map[string]*qc.Value{keyStamp: qc.NewValueFromFields(map[string]*qc.Value{
		"installation": qc.NewValueString(s.Installation.String()),
		"nonce":        qc.NewValueString(s.Nonce.String()),
		"at":           qc.NewValueString(s.At.UTC().Format(time.RFC3339Nano)),
	})}
}

func decodeStamp(payload map[string]*qc.Value) (corpus.Stamp, bool) {
	f := payload[keyStamp].GetStructValue().GetFields()
	installation, err1 := uuid.Parse(f["installation"].GetStringValue())
	nonce, err2 := uuid.Parse(f["nonce"].GetStringValue())
	at, err3 := time.Parse(time.RFC3339Nano, f["at"].GetStringValue())
	return corpus.Stamp{Installation: corpus.ID(installation), Nonce: corpus.ID(nonce), At: at}, err1 == nil && err2 == nil && err3 == nil
}

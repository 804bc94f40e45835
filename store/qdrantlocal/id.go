package qdrantlocal

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"strconv"

	"github.com/google/uuid"
	"github.com/qdrant/go-client/qdrant"
)

// pointID is a point's id. Numbers sort before UUIDs, UUIDs by their bytes.
type pointID struct {
	hi, lo uint64
	uuid   bool
}

func (a pointID) compare(b pointID) int {
	if a.uuid != b.uuid {
		if b.uuid {
			return -1
		}
		return 1
	}
	if c := cmp.Compare(a.hi, b.hi); c != 0 {
		return c
	}
	return cmp.Compare(a.lo, b.lo)
}

// String spells the id as the real server does in its messages.
func (a pointID) String() string {
	if !a.uuid {
		return strconv.FormatUint(a.lo, 10)
	}
	return a.uuidText()
}

func (a pointID) uuidText() string {
	var raw [16]byte
	binary.BigEndian.PutUint64(raw[:8], a.hi)
	binary.BigEndian.PutUint64(raw[8:], a.lo)
	var b [36]byte
	hex.Encode(b[0:8], raw[0:4])
	b[8] = '-'
	hex.Encode(b[9:13], raw[4:6])
	b[13] = '-'
	hex.Encode(b[14:18], raw[6:8])
	b[18] = '-'
	hex.Encode(b[19:23], raw[8:10])
	b[23] = '-'
	hex.Encode(b[24:36], raw[10:16])
	return string(b[:])
}

func uuidID(raw [16]byte) pointID {
	return pointID{
		hi:   binary.BigEndian.Uint64(raw[:8]),
		lo:   binary.BigEndian.Uint64(raw[8:]),
		uuid: true,
	}
}

// parseID reads an id of a request. UUIDs may come in any of their usual spellings.
func parseID(id *qdrant.PointId) (pointID, error) {
	switch k := id.GetPointIdOptions().(type) {
	case *qdrant.PointId_Num:
		return pointID{lo: k.Num}, nil
	case *qdrant.PointId_Uuid:
		u, err := uuid.Parse(k.Uuid)
		if err != nil {
			return pointID{}, invalidf("Unable to parse UUID: %s", k.Uuid)
		}
		return uuidID(u), nil
	default:
		return pointID{}, invalid("No ID options provided")
	}
}

func parseIDs(in []*qdrant.PointId) ([]pointID, error) {
	out := make([]pointID, len(in))
	for i, id := range in {
		p, err := parseID(id)
		if err != nil {
			return nil, err
		}
		out[i] = p
	}
	return out, nil
}

// idBatch makes API ids in few allocations: a page of a scroll holds thousands.
type idBatch struct {
	ids   []qdrant.PointId
	uuids []qdrant.PointId_Uuid
	nums  []qdrant.PointId_Num
}

func newIDBatch(n int) *idBatch {
	return &idBatch{ids: make([]qdrant.PointId, 0, n), uuids: make([]qdrant.PointId_Uuid, 0, n)}
}

// add returns the API form of id, which stays valid after the batch is dropped.
func (b *idBatch) add(id pointID) *qdrant.PointId {
	if len(b.ids) == cap(b.ids) {
		b.ids = make([]qdrant.PointId, 0, 64)
	}
	b.ids = b.ids[:len(b.ids)+1]
	out := &b.ids[len(b.ids)-1]
	if id.uuid {
		if len(b.uuids) == cap(b.uuids) {
			b.uuids = make([]qdrant.PointId_Uuid, 0, 64)
		}
		b.uuids = append(b.uuids, qdrant.PointId_Uuid{Uuid: id.uuidText()})
		out.PointIdOptions = &b.uuids[len(b.uuids)-1]
		return out
	}
	if len(b.nums) == cap(b.nums) {
		b.nums = make([]qdrant.PointId_Num, 0, 64)
	}
	b.nums = append(b.nums, qdrant.PointId_Num{Num: id.lo})
	out.PointIdOptions = &b.nums[len(b.nums)-1]
	return out
}

func apiID(id pointID) *qdrant.PointId { return newIDBatch(1).add(id) }

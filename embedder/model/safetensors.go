package model

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"
)

// maxSafetensorsHeader bounds the JSON header; the format's own limit is 100 MB.
const maxSafetensorsHeader = 100 << 20

// readSafetensors lists the tensors of a safetensors file of the given size. It reads the
// header alone; tensors stay on disk behind r.
func readSafetensors(file string, r io.ReaderAt, size int64) ([]*tensor, error) {
	var prefix [8]byte
	if _, err := r.ReadAt(prefix[:], 0); err != nil {
		return nil, damaged(file, "is too short to be a safetensors file", err)
	}
	n := binary.LittleEndian.Uint64(prefix[:])
	if n < 2 || n > maxSafetensorsHeader || int64(n) > size-8 {
		return nil, damaged(file, "has a safetensors header that does not fit in it", nil)
	}
	header := make([]byte, n)
	if _, err := r.ReadAt(header, 8); err != nil {
		return nil, damaged(file, "ends inside its header", err)
	}
	var entries map[string]json.RawMessage
	if err := json.Unmarshal(header, &entries); err != nil {
		return nil, damaged(file, "has a safetensors header that is not JSON", err)
	}
	delete(entries, "__metadata__")
	body := size - 8 - int64(n)
	list := make([]*tensor, 0, len(entries))
	for name, raw := range entries {
		var e struct {
			DType   dtype   `json:"dtype"`
			Shape   []int   `json:"shape"`
			Offsets []int64 `json:"data_offsets"`
		}
		if err := json.Unmarshal(raw, &e); err != nil {
			return nil, damaged(file, fmt.Sprintf("has a damaged entry for %q", name), err)
		}
		count, ok := elementCount(e.Shape)
		width, known := dtypeSize[e.DType]
		switch {
		case !known:
			return nil, damaged(file, fmt.Sprintf("stores %q in an unknown type %q", name, e.DType), nil)
		case !ok, len(e.Offsets) != 2,
			e.Offsets[0] < 0, e.Offsets[1] < e.Offsets[0], e.Offsets[1] > body,
			e.Offsets[1]-e.Offsets[0] != int64(count)*width:
			return nil, damaged(file, fmt.Sprintf("has a place for %q that does not fit its shape or the file", name), nil)
		}
		list = append(list, &tensor{
			name: name, dtype: e.DType, shape: e.Shape,
			src: r, off: 8 + int64(n) + e.Offsets[0], file: file,
		})
	}
	slices.SortFunc(list, func(a, b *tensor) int {
		return cmp.Or(cmp.Compare(a.off, b.off), cmp.Compare(a.name, b.name))
	})
	for i, t := range list[:max(len(list)-1, 0)] {
		if t.off+int64(t.elements())*dtypeSize[t.dtype] > list[i+1].off {
			return nil, damaged(file, fmt.Sprintf("has %q and %q in the same place", t.name, list[i+1].name), nil)
		}
	}
	return list, nil
}

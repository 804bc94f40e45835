package qdrantlocal

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// fuzzSpec is the collection that fuzzed logs belong to.
func fuzzSpec(t testing.TB) *collectionSpec {
	t.Helper()
	spec, err := newSpec(&qdrant.CreateCollection{
		CollectionName: "f",
		VectorsConfig: qdrant.NewVectorsConfigMap(map[string]*qdrant.VectorParams{
			"a": {Size: 2, Distance: qdrant.Distance_Dot},
			"m": {Size: 2, Distance: qdrant.Distance_Dot, MultivectorConfig: &qdrant.MultiVectorConfig{}},
		}),
		SparseVectorsConfig: qdrant.NewSparseVectorsConfig(map[string]*qdrant.SparseVectorParams{"s": {}}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// FuzzRecord feeds a record's body, which passed its checksum, to the state: it never
// panics, and what it accepts it can write out and read again to the same state.
func FuzzRecord(f *testing.F) {
	c := newCollection("f", "", fuzzSpec(f))
	cols := c.vectors
	p := point{id: pointID{lo: 7}, payload: []byte("\n\x05\n\x01a\x12\x00"), vectors: []numberedVector{
		{number: 0, data: vectorData{flat: []float32{1, 2}}},
		{number: 1, data: vectorData{flat: []float32{1, 2, 3, 4}}},
		{number: 2, data: vectorData{flat: []float32{1}, indices: []uint32{5}}},
	}}
	f.Add(uint8(recordPoints), appendPoint([]byte{1}, cols, &p))
	f.Add(uint8(recordDelete), appendID([]byte{1}, pointID{hi: 1, lo: 2, uuid: true}))
	f.Add(uint8(recordPayloads), append(appendCount(appendID([]byte{1}, p.id), len(p.payload)), p.payload...))
	f.Add(uint8(recordVectors), []byte{1, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1})
	f.Fuzz(func(t *testing.T, kind uint8, body []byte) {
		c := newCollection("f", "", fuzzSpec(t))
		c.columns["a"] = newColumn(jsonPath{text: "a", first: "a"}, columnKeyword, nil)
		if err := c.apply(logRecord{kind: recordPoints, seq: 1, body: appendPoint([]byte{1}, cols, &p)}, false); err != nil {
			t.Fatal(err)
		}
		if err := c.apply(logRecord{kind: recordKind(kind), seq: 2, body: body}, false); err != nil {
			return
		}
		first, _, n, done := c.snapshotChunk(nil, pointID{}, 1<<30)
		if !done || n != c.ids.Len() {
			t.Fatalf("%d points of %d, done %v", n, c.ids.Len(), done)
		}
		again := newCollection("f", "", fuzzSpec(t))
		if err := again.apply(logRecord{kind: recordPoints, seq: 3, body: first}, false); err != nil {
			t.Fatalf("reading what was written: %v", err)
		}
		second, _, _, _ := again.snapshotChunk(nil, pointID{}, 1<<30)
		if !bytes.Equal(first, second) {
			t.Fatal("a snapshot of a snapshot differs")
		}
	})
}

// FuzzLog puts bytes behind a valid log: opening never panics, and either reports damage or
// serves exactly what was there; a log that opened opens again.
func FuzzLog(f *testing.F) {
	base := f.TempDir()
	s, err := Open(base, Options{fsync: noSync})
	if err != nil {
		f.Fatal(err)
	}
	d := newDriver(f, s, 4)
	for range 6 {
		d.step(true)
	}
	want := d.want.text()
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	log, err := os.ReadFile(onlyFile(f, base, logPrefix))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{})
	f.Add(log[fileHeader:])
	f.Add(log[len(log)-40:])
	f.Add(bytes.Repeat([]byte{0x17, 0x9b, 0x0e, 0x5c}, 20))
	f.Fuzz(func(t *testing.T, tail []byte) {
		dir := t.TempDir()
		copyDir(t, base, dir)
		if err := os.WriteFile(onlyFile(t, dir, logPrefix), append(bytes.Clone(log), tail...), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := reopen(t, dir)
		var damage *CorruptionError
		switch {
		case errors.As(err, &damage):
			return
		case err != nil:
			t.Fatal(err)
		case got != want && !bytes.Contains(tail, []byte{0x17, 0x9b, 0x0e, 0x5c}):
			t.Fatalf("served %s, want %s", got, want)
		}
		if again, err := reopen(t, dir); err != nil || again != got {
			t.Fatalf("opened again: %v", err)
		}
	})
}

// FuzzReader reads bytes as a log file in memory: it never panics, always ends, and yields
// whole what precedes the first change.
func FuzzReader(f *testing.F) {
	id := fileID{generation: 1, salt: 42}
	log := encodeHeader(id)
	var ends []int
	for i := range 5 {
		rec := append(beginRecord(nil, recordDelete), bytes.Repeat([]byte{byte(i)}, 3*i)...)
		sealRecord(rec, id, uint64(i+1), uint64(len(log)))
		log = append(log, rec...)
		ends = append(ends, len(log))
	}
	f.Add(log)
	f.Add(log[:len(log)-3])
	f.Add(append(bytes.Clone(log[:60]), log[70:]...))
	f.Fuzz(func(t *testing.T, file []byte) {
		same := 0
		for same < min(len(file), len(log)) && file[same] == log[same] {
			same++
		}
		l, ok, err := openReader(bytes.NewReader(file), int64(len(file)))
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			if same >= fileHeader {
				t.Fatal("a valid header is refused")
			}
			return
		}
		n := 0
		for {
			off := l.off
			rec, err := l.next()
			if errors.Is(err, io.EOF) {
				break
			}
			if errors.Is(err, errBadRecord) {
				if n < len(ends) && ends[n] <= same {
					t.Fatalf("record %d is whole and refused", n)
				}
				if _, err := l.provenBeyond(); err != nil {
					t.Fatal(err)
				}
				return
			}
			if err != nil || l.off <= off || len(rec.body) > len(file) {
				t.Fatalf("%v, from %d to %d", err, off, l.off)
			}
			n++
		}
	})
}

// FuzzFilter compiles and runs a filter in its JSON form over a payload: it never panics,
// and answers the same with and without indexes.
func FuzzFilter(f *testing.F) {
	for _, seed := range []string{
		`{"must":[{"field":{"key":"k","match":{"keyword":"a"}}}]}`,
		`{"should":[{"field":{"key":"n","range":{"gte":1,"lt":3}}},{"isEmpty":{"key":"k"}}]}`,
		`{"mustNot":[{"nested":{"key":"o","filter":{"must":[{"field":{"key":"x","match":{"integer":"1"}}}]}}}]}`,
		`{"minShould":{"minCount":"1","conditions":[{"isNull":{"key":"k"}},{"hasId":{"hasId":[{"num":"1"}]}}]}}`,
		`{"must":[{"field":{"key":"d","datetimeRange":{"gt":"2024-01-01T00:00:00Z"}}},{"field":{"key":"n","valuesCount":{"gt":"0"}}}]}`,
		`{"must":[{"field":{"key":"n","match":{"exceptIntegers":{"integers":["1"]}}}},{"hasVector":{"hasVector":"a"}}]}`,
	} {
		f.Add([]byte(seed), []byte(`{"k":["a",null],"n":1,"d":"2024-05-01","o":[{"x":1}],"f":1.5,"b":true}`))
	}
	f.Fuzz(func(t *testing.T, filterJSON, payloadJSON []byte) {
		var qf qdrant.Filter
		var st qdrant.Struct
		if protojson.Unmarshal(filterJSON, &qf) != nil || !plainJSON(payloadJSON, &st) {
			return
		}
		payload, err := encodePayload(st.GetFields())
		if err != nil {
			return
		}
		c := newCollection("f", "", fuzzSpec(t))
		p := point{id: pointID{lo: 1}, payload: payload}
		if err := c.apply(logRecord{kind: recordPoints, seq: 1, body: appendPoint([]byte{1}, c.vectors, &p)}, false); err != nil {
			t.Fatal(err)
		}
		plain, err := compileFilter(c, &qf)
		if err != nil {
			return
		}
		for key, kind := range map[string]columnKind{"k": columnKeyword, "n": columnInteger, "f": columnFloat, "b": columnBool, "d": columnDatetime} {
			c.addColumn(key, newColumn(jsonPath{text: key, first: key}, kind, nil))
		}
		indexed, err := compileFilter(c, proto.CloneOf(&qf))
		if err != nil {
			t.Fatal(err)
		}
		d := c.document(0)
		if a, b := plain.match(&d), indexed.match(&d); a != b {
			t.Fatalf("%v without indexes, %v with", a, b)
		}
	})
}

// plainJSON reads an ordinary JSON object as a payload.
func plainJSON(text []byte, st *qdrant.Struct) bool {
	m, err := decodeObject(text)
	if err != nil {
		return false
	}
	st.Fields, err = qdrant.TryValueMap(m)
	return err == nil
}

// FuzzPayload reads bytes as an encoded payload at a path: it never panics.
func FuzzPayload(f *testing.F) {
	f.Add([]byte("\n\x05\n\x01a\x12\x00"), "a.b[0].c[]")
	f.Add([]byte{0x0a, 0xff}, `"x y"[]`)
	f.Fuzz(func(_ *testing.T, payload []byte, path string) {
		p, err := parsePath(path)
		if err != nil {
			return
		}
		p.each(payload, func(v value) bool {
			v.isNull()
			return true
		})
	})
}

// FuzzCatalogue reads bytes as a catalogue: it never panics.
func FuzzCatalogue(f *testing.F) {
	enc, err := encodeCatalogue(&catalogue{Aliases: map[string]string{"a": "b"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(enc)
	f.Fuzz(func(t *testing.T, raw []byte) {
		var cat catalogue
		if decodeCatalogue(raw, &cat) != nil {
			return
		}
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, collectionsDir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, catalogueFile), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := Open(dir, Options{fsync: noSync}); err == nil {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

// decodeObject reads a JSON object; numbers without a fraction become integers.
func decodeObject(text []byte) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var m map[string]any
	if err := d.Decode(&m); err != nil {
		return nil, err
	}
	var fix func(v any) any
	fix = func(v any) any {
		switch x := v.(type) {
		case map[string]any:
			for k, c := range x {
				x[k] = fix(c)
			}
		case []any:
			for i, c := range x {
				x[i] = fix(c)
			}
		case json.Number:
			if i, err := x.Int64(); err == nil {
				return i
			}
			if f, err := x.Float64(); err == nil {
				return f
			}
			return nil
		}
		return v
	}
	fix(m)
	return m, nil
}

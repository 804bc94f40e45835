package httpapi

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/embedder/fake"
	"github.com/lockstep-db/lockstep/internal/corpus"
)

func (b *bench) dense(t *testing.T, text string) []float32 {
	t.Helper()
	out, err := b.model.Embed(t.Context(), corpus.EmbedRequest{Inputs: []corpus.EmbedInput{{Text: text}}, Heads: corpus.Dense})
	if err != nil {
		t.Fatal(err)
	}
	return out[0].Vectors.Dense
}

func floats(v any) []float32 {
	var out []float32
	for _, x := range v.([]any) {
		out = append(out, float32(x.(float64)))
	}
	return out
}

func decodeLE(b []byte) []float32 {
	out := make([]float32, len(b)/4)
	for i := range out {
		out[i] = math.Float32frombits(binary.LittleEndian.Uint32(b[4*i:]))
	}
	return out
}

func same(a, b []float32) bool { return fmt.Sprint(a) == fmt.Sprint(b) }

func TestEmbedEveryForm(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want := b.dense(t, "hello world")
	a := b.post("/embed", `{"texts":["hello world","a"]}`)
	o := a.object(t)
	if a.status != 200 || !same(floats(o["embeddings"].([]any)[0]), want) || o["dimensions"] != 8.0 || o["model"] != b.model.Spec().Name {
		t.Errorf("%d %s", a.status, a.body)
	}
	if _, ok := o["sparse"]; ok {
		t.Error("an output that was not asked for was sent")
	}
	if fmt.Sprint(o["tokens"], o["original_tokens"], o["truncated"]) != "[4 3] [4 3] [false false]" {
		t.Errorf("tokens: %s", a.body)
	}
	o = b.post("/embed", `{"texts":["one two three four"],"max_length":4,"output_type":["dense","sparse","colbert"],"batch_size":1}`).object(t)
	if fmt.Sprint(o["tokens"], o["original_tokens"], o["truncated"]) != "[4] [6] [true]" {
		t.Errorf("truncation: %v", o)
	}
	if len(o["sparse"].([]any)[0].(map[string]any)) != 2 || len(o["colbert"].([]any)[0].([]any)) != 3 || len(o["embeddings"].([]any)) != 1 {
		t.Errorf("outputs: %v", o)
	}
	for k := range o["sparse"].([]any)[0].(map[string]any) {
		if _, err := strconv.Atoi(k); err != nil {
			t.Errorf("sparse key %q is no token id", k)
		}
	}
	o = b.post("/embed", `{"texts":["hello world"],"encoding":"base64","output_type":["dense","colbert"]}`).object(t)
	raw, err := base64.StdEncoding.DecodeString(o["embeddings"].([]any)[0].(string))
	if err != nil || !same(decodeLE(raw), want) {
		t.Errorf("base64: %v %v", o, err)
	}
	raw, err = base64.StdEncoding.DecodeString(o["colbert"].([]any)[0].(string))
	if err != nil || len(raw) != 3*4*b.model.Spec().ColBERTDim {
		t.Errorf("base64 colbert has %d bytes, %v", len(raw), err)
	}
	a = b.do("POST", "/embed", `{"texts":["a","hello world"]}`, "Accept", "application/octet-stream")
	if a.status != 200 || a.header.Get("X-Embedding-Shape") != "2,8" || a.header.Get("Content-Type") != "application/octet-stream" || !same(decodeLE(a.body)[8:], want) {
		t.Errorf("bytes: %d %v", a.status, a.header)
	}
	b.want(b.do("POST", "/embed", `{"texts":["a"],"output_type":"sparse"}`, "Accept", "application/octet-stream"), 422, "validation_failed", "/output_type")
	// White space only is text like any other; unknown characters too.
	if a := b.post("/embed", `{"texts":["  ","\u200d","👩‍👩‍👧","\ufeff"],"output_type":["dense","sparse"]}`); a.status != 200 {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// TestUnnormalised asks for the vectors as they were before they got length 1, in every form.
func TestUnnormalised(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	out, err := b.model.Embed(t.Context(), corpus.EmbedRequest{Inputs: []corpus.EmbedInput{{Text: "hello world"}}, Heads: corpus.Dense})
	if err != nil {
		t.Fatal(err)
	}
	want := out[0].Vectors.Dense
	for i := range want {
		want[i] *= out[0].Vectors.DenseNorm
	}
	if n := out[0].Vectors.DenseNorm; n == 0 || n == 1 {
		t.Fatalf("a length of %v shows nothing", n)
	}
	first := func(a answer) []float32 {
		t.Helper()
		rows, _ := a.object(t)["embeddings"].([]any)
		if a.status != 200 || len(rows) == 0 {
			t.Fatalf("%d %s", a.status, a.body)
		}
		return floats(rows[0])
	}
	if got := first(b.post("/embed", `{"texts":["hello world"],"normalize":false}`)); !same(got, want) {
		t.Errorf("got %v, expected %v", got, want)
	}
	if got := first(b.post("/embed", `{"texts":["hello world"],"normalize":false,"output_type":["dense","colbert"]}`)); !same(got, want) {
		t.Errorf("beside token vectors: got %v, expected %v", got, want)
	}
	a := b.do("POST", "/embed", `{"texts":["hello world"],"normalize":false}`, "Accept", mediaBytes)
	if got := decodeLE(a.body); !same(got, want) {
		t.Errorf("as bytes: got %v, expected %v", got, want)
	}
	for body, n := range map[string]int{
		`{"inputs":"hello world","normalize":false}`:                8,
		`{"inputs":"hello world","normalize":false,"dimensions":3}`: 3,
	} {
		var rows [][]float32
		if err := json.Unmarshal(b.post("/embed", body).body, &rows); err != nil || len(rows) != 1 || !same(rows[0], want[:n]) {
			t.Errorf("%s: got %v (%v), expected %v", body, rows, err, want[:n])
		}
	}
}

func TestDenormalise(t *testing.T) {
	t.Parallel()
	vectors := func(norm float32, v ...float32) []corpus.Embedding {
		return []corpus.Embedding{{Vectors: corpus.Vectors{Dense: v, DenseNorm: norm}}}
	}
	if out := vectors(0, 0, 0); denormalise(out, "/texts/", 0) != nil {
		t.Error("a vector of zeros has length 0 and was refused")
	}
	if out := vectors(0, 0.6, 0.8); denormalise(out, "/texts/", 0) == nil {
		t.Error("a vector whose length is not known was sent as zeros")
	}
}

func TestEmbedLimits(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	list := func(n int) string { return "[" + strings.TrimSuffix(strings.Repeat(`"a",`, n), ",") + "]" }
	if a := b.post("/embed", `{"texts":`+list(1000)+`,"batch_size":128}`); a.status != 200 {
		t.Errorf("1000 texts: %d", a.status)
	}
	b.want(b.post("/embed", `{"texts":`+list(1001)+`}`), 422, "validation_failed", "/texts")
}

func TestEmbedWithoutTheHead(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) { b.model = fake.New(8, corpus.Dense) })
	b.want(b.post("/embed", `{"texts":["a"],"output_type":["dense","sparse"]}`), 422, "validation_failed", "/output_type/1")
	for _, path := range []string{"/embed_sparse", "/embed_all"} {
		a := b.post(path, `{"inputs":"a"}`)
		if a.status != 424 || a.object(t)["error_type"] != "Backend" {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
}

func TestOneBadTextNamesItself(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) {
		b.model.Fail = func(text string) error {
			if text == "poison" {
				return corpus.Errorf(corpus.Internal, "not_finite", "the model gave no finite numbers")
			}
			return nil
		}
	})
	b.want(b.post("/embed", `{"texts":["a","poison"]}`), 500, "not_finite", "/texts/1")
	b.want(b.post("/embed", `{"texts":["a","poison"],"output_type":"colbert"}`), 500, "not_finite", "/texts/1")
	a := b.post("/embed", `{"inputs":["a","poison"]}`)
	if a.status != 500 || a.object(t)["error_type"] != "Backend" {
		t.Errorf("TEI: %d %s", a.status, a.body)
	}
	a = b.post("/v1/embeddings", `{"input":["a","poison"]}`)
	if e := a.object(t)["error"].(map[string]any); a.status != 500 || e["type"] != "server_error" || e["param"] != "texts[1]" && e["param"] != "input[1]" {
		t.Errorf("OpenAI: %d %s", a.status, a.body)
	}
}

// TestLargeColBERTReplyIsStreamed asks for more than may be held and reads all of it.
func TestLargeColBERTReplyIsStreamed(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) { b.model = fake.New(128, allHeads) })
	text := strings.Repeat("word ", 500)
	req, err := json.Marshal(map[string]any{"texts": strings.Split(strings.Repeat(text+"\n", 100), "\n")[:100], "output_type": []string{"colbert", "dense"}, "encoding": "base64"})
	if err != nil {
		t.Fatal(err)
	}
	a := b.send("POST", "/embed", bytes.NewReader(req))
	o := a.object(t)
	if a.status != 200 || len(o["colbert"].([]any)) != 100 || len(o["embeddings"].([]any)) != 100 || len(o["tokens"].([]any)) != 100 {
		t.Fatalf("%d, %d bytes", a.status, len(a.body))
	}
	if calls, _ := b.model.Counts(); calls < 2 {
		t.Errorf("the reply was computed in %d call", calls)
	}
	for i, m := range o["colbert"].([]any) {
		if raw, err := base64.StdEncoding.DecodeString(m.(string)); err != nil || len(raw) != 501*4*b.model.Spec().ColBERTDim || len(raw) == 0 {
			t.Fatalf("text %d: %d bytes, %v", i, len(raw), err)
		}
	}
}

// TestAFailureInMidStreamBreaksTheTransfer: a reply that has begun must never look complete.
func TestAFailureInMidStreamBreaksTheTransfer(t *testing.T) {
	t.Parallel()
	b := setup(t, func(_ *Config, b *bench) {
		b.model = fake.New(256, allHeads)
		b.model.Fail = func(text string) error {
			if strings.HasPrefix(text, "poison") {
				return corpus.Errorf(corpus.Internal, "not_finite", "not finite")
			}
			return nil
		}
	})
	texts := make([]string, 200)
	for i := range texts {
		texts[i] = strings.Repeat("word ", 400)
	}
	texts[199] = "poison"
	raw, err := json.Marshal(map[string]any{"texts": texts, "output_type": "colbert"})
	if err != nil {
		t.Fatal(err)
	}
	res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Post(b.url+"/embed", "application/json", bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	n, err := io.Copy(io.Discard, res.Body)
	if res.StatusCode != 200 || err == nil {
		t.Errorf("status %d, %d bytes, error %v: the transfer should break", res.StatusCode, n, err)
	}
}

func TestTEI(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want := b.dense(t, "hello world")
	var rows [][]float32
	decode := func(a answer) {
		t.Helper()
		rows = nil
		if err := json.Unmarshal(a.body, &rows); err != nil || a.status != 200 {
			t.Fatalf("%d %s: %v", a.status, a.body, err)
		}
	}
	decode(b.post("/embed", `{"inputs":"hello world"}`))
	if len(rows) != 1 || !same(rows[0], want) {
		t.Errorf("one string gave %v", rows)
	}
	decode(b.post("/embed", `{"truncate":true,"inputs":["a","hello world"],"normalize":true,"unknown":1,"prompt_name":null,"truncation_direction":"Left"}`))
	if len(rows) != 2 || !same(rows[1], want) {
		t.Errorf("a list gave %v", rows)
	}
	decode(b.post("/embed", `{"inputs":[5,6,7]}`))
	if len(rows) != 1 {
		t.Errorf("[5,6,7] is one input, gave %d", len(rows))
	}
	decode(b.post("/embed", `{"inputs":[[5],[6],"x"]}`))
	if len(rows) != 3 {
		t.Errorf("[[5],[6],x] are three inputs, gave %d", len(rows))
	}
	a := b.post("/embed", `{"inputs":"hello world","dimensions":2}`)
	decode(a)
	if n := math.Hypot(float64(rows[0][0]), float64(rows[0][1])); len(rows[0]) != 2 || math.Abs(n-1) > 1e-6 {
		t.Errorf("dimensions: %v has length %v", rows[0], n)
	}
	if a.header.Get("X-Compute-Tokens") != "4" || a.header.Get("X-Compute-Characters") != "11" || a.header.Get("X-Compute-Type") == "" {
		t.Errorf("headers %v", a.header)
	}
	if a := b.post("/embed_sparse", `{"inputs":["hello world"]}`); a.status != 200 || !strings.HasPrefix(string(a.body), `[[{"index":`) {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a := b.post("/embed_all", `{"inputs":["hello world","x"]}`); a.status != 200 || strings.Count(string(a.body), "[") != 1+2+3+2 {
		t.Errorf("%d %s", a.status, a.body)
	}
	for body, want := range map[string]struct {
		status int
		kind   string
	}{
		`{"inputs":[]}`:                                    {400, "Empty"},
		`{"inputs":""}`:                                    {400, "Empty"},
		`{"inputs":["a",""]}`:                              {400, "Empty"},
		`{"inputs":[[]]}`:                                  {400, "Empty"},
		`{"inputs":5}`:                                     {422, "Validation"},
		`{"inputs":[[1.5]]}`:                               {422, "Validation"},
		`{"inputs":[-1]}`:                                  {422, "Validation"},
		`{"inputs":"a","truncate":"yes"}`:                  {422, "Validation"},
		`{"inputs":"a","prompt_name":"query"}`:             {422, "Validation"},
		`{"inputs":"a","dimensions":0}`:                    {422, "Validation"},
		`{"inputs":"a","dimensions":9}`:                    {422, "Validation"},
		`{"inputs":"a","truncation_direction":"up"}`:       {422, "Validation"},
		`{"inputs":"a\u0000"}`:                             {422, "Validation"},
		`{"inputs":"a`:                                     {400, "Validation"},
		`{"inputs":` + strings.Repeat(`"a",`, 0) + `null}`: {422, "Validation"},
	} {
		a := b.post("/embed", body)
		if a.status != want.status || a.object(t)["error_type"] != want.kind || a.object(t)["error"] == "" {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	long := strings.Repeat("a ", b.model.Spec().MaxTokens+5)
	if a := b.post("/embed", `{"inputs":"`+long+`","truncate":false}`); a.status != 422 || !strings.Contains(string(a.body), strconv.Itoa(b.model.Spec().MaxTokens)) {
		t.Errorf("too long: %d %s", a.status, a.body)
	}
	if a := b.post("/embed", `{"inputs":["`+strings.Repeat(`a","`, 2048)+`a"]}`); a.status != 422 {
		t.Errorf("2049 inputs: %d", a.status)
	}
	info := b.get("/info").object(t)
	if info["model_id"] != b.model.Spec().Name || info["max_client_batch_size"] != 2048.0 || info["device"] != b.model.Spec().Device || info["auto_truncate"] != true {
		t.Errorf("info %v", info)
	}
}

func TestTokenize(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	a := b.post("/tokenize", `{"inputs":["héllo wörld"]}`)
	var out [][]map[string]any
	if err := json.Unmarshal(a.body, &out); err != nil || len(out) != 1 || len(out[0]) != 4 {
		t.Fatalf("%d %s", a.status, a.body)
	}
	if out[0][0]["special"] != true || out[0][0]["start"] != nil || out[0][3]["special"] != true {
		t.Errorf("special tokens: %s", a.body)
	}
	if w := out[0][2]; w["text"] != "wörld" || w["start"] != 6.0 || w["stop"] != 11.0 {
		t.Errorf("places are counted in characters: %v", w)
	}
	a = b.post("/tokenize", `{"inputs":"hello","add_special_tokens":false}`)
	if err := json.Unmarshal(a.body, &out); err != nil || len(out[0]) != 1 {
		t.Errorf("%s", a.body)
	}
	if a := b.post("/tokenize", `{"inputs":[""]}`); a.status != 400 || a.object(t)["error_type"] != "Empty" {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestOpenAI(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want := b.dense(t, "hello world")
	name := b.model.Spec().Name
	o := b.post("/v1/embeddings", `{"input":"hello world","model":"`+name+`","encoding_format":null,"user":"u","dimensions":null}`).object(t)
	d := o["data"].([]any)[0].(map[string]any)
	if !same(floats(d["embedding"]), want) || d["index"] != 0.0 || d["object"] != "embedding" || o["object"] != "list" || o["model"] != name {
		t.Errorf("%v", o)
	}
	if u := o["usage"].(map[string]any); u["prompt_tokens"] != 4.0 || u["total_tokens"] != 4.0 {
		t.Errorf("usage %v", u)
	}
	o = b.post("/v1/embeddings", `{"input":["hello world",[5,6]],"encoding_format":"base64"}`).object(t)
	raw, err := base64.StdEncoding.DecodeString(o["data"].([]any)[0].(map[string]any)["embedding"].(string))
	if err != nil || !same(decodeLE(raw), want) {
		t.Errorf("base64: %v", o)
	}
	if n := len(b.post("/v1/embeddings", `{"input":[1,2,3]}`).object(t)["data"].([]any)); n != 1 {
		t.Errorf("[1,2,3] is one input, gave %d", n)
	}
	if n := len(b.post("/v1/embeddings", `{"input":[[1],[2]]}`).object(t)["data"].([]any)); n != 2 {
		t.Errorf("[[1],[2]] are two inputs, gave %d", n)
	}
	if n := len(b.post("/v1/embeddings", `{"input":"hello world","dimensions":3}`).object(t)["data"].([]any)[0].(map[string]any)["embedding"].([]any)); n != 3 {
		t.Errorf("dimensions 3 gave %d", n)
	}
	for body, want := range map[string]struct {
		status      int
		code, param string
	}{
		`{}`:                                    {400, "required", "input"},
		`{"input":[]}`:                          {400, "empty_input", "input"},
		`{"input":""}`:                          {400, "empty_input", "input[0]"},
		`{"input":["a","b","c",""]}`:            {400, "empty_input", "input[3]"},
		`{"input":"a","model":"gpt-4"}`:         {404, "model_not_found", "model"},
		`{"input":"a","dimensions":0}`:          {400, "out_of_range", "dimensions"},
		`{"input":"a","dimensions":9}`:          {400, "out_of_range", "dimensions"},
		`{"input":"a","encoding_format":"hex"}`: {400, "unknown_value", "encoding_format"},
		`{"input":{"a":1}}`:                     {400, "wrong_type", "input"},
		`{"input":"a`:                           {400, "invalid_json", "input"},
		`{"input":"` + strings.Repeat("a ", b.model.Spec().MaxTokens+5) + `"}`: {400, "input_too_long", "input[0]"},
	} {
		a := b.post("/v1/embeddings", body)
		e, ok := a.object(t)["error"].(map[string]any)
		if !ok || a.status != want.status || e["code"] != want.code || e["param"] != want.param && want.code != "invalid_json" || e["type"] != "invalid_request_error" || e["message"] == "" {
			t.Errorf("%.60s: %d %s", body, a.status, a.body)
		}
	}
	a := b.do("POST", "/v1/embeddings", "x", "Content-Type", "text/plain")
	if e := a.object(t)["error"].(map[string]any); a.status != 415 || e["code"] != "unsupported_media_type" {
		t.Errorf("%d %s", a.status, a.body)
	}
	if m := b.get("/v1/models").object(t)["data"].([]any)[0].(map[string]any); m["id"] != name {
		t.Errorf("models %v", m)
	}
	if a := b.get("/v1/models/" + name); a.status != 200 {
		t.Errorf("%d", a.status)
	}
	if a := b.get("/v1/models/other"); a.status != 404 || a.object(t)["error"].(map[string]any)["code"] != "model_not_found" {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func FuzzAppendFloat(f *testing.F) {
	for _, s := range []uint32{0, 0x80000000, 1, 0x7f7fffff, 0x3f800000, 0x33d6bf95} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, bits uint32) {
		x := math.Float32frombits(bits)
		if bits&0x7f800000 == 0x7f800000 {
			return
		}
		var back float32
		if err := json.Unmarshal(appendFloat(nil, x), &back); err != nil || back != x {
			t.Fatalf("%v became %s", x, appendFloat(nil, x))
		}
	})
}

func BenchmarkAppendDense(b *testing.B) {
	row := make([]float32, 1024)
	for i := range row {
		row[i] = float32(math.Sin(float64(i))) / 32
	}
	for name, f := range map[string]func([]byte) []byte{
		"json":   func(buf []byte) []byte { return appendFloats(buf, row) },
		"base64": func(buf []byte) []byte { buf, _ = appendBase64(buf, nil, row); return buf },
		"bytes":  func(buf []byte) []byte { return appendLittleEndian(buf, row) },
	} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 0, 1<<16)
			b.SetBytes(4 * int64(len(row)))
			for b.Loop() {
				buf = f(buf[:0])
			}
		})
	}
}

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"
)

// Search is `lockstep search`.
func Search(ctx context.Context, e *Env) int {
	set := e.flags("search", "[flags] QUERY...", "Searches a collection of a running server. The words of QUERY are one query.")
	server := e.serverFlag(set)
	output := outputFlag(set)
	collection := set.String("collection", "", "collection to search (default: the server's)")
	limit := set.Int("limit", 10, "most results")
	offset := set.Int("offset", 0, "results to skip")
	mode := set.String("mode", "", "dense, sparse, hybrid or hybrid_rerank (default: hybrid where the model has a sparse output)")
	filter := set.String("filter", "", `filter as JSON, such as {"must":[{"key":"lang","match":"en"}]}`)
	threshold := set.Float64("score-threshold", 0, "lowest score; 0 is none")
	group := set.Bool("group", false, "best chunk of each document only")
	around := set.Int("context", 0, "chunks to show before and after each hit")
	like := set.String("like", "", "search for neighbours of the document with this id instead of a query")
	highlight := set.Bool("highlight", false, "show the terms of the query that a hit's sparse vector has")
	explain := set.Bool("explain", false, "show each head's rank and score, and what the consistency join did")
	operands, code, ok := e.parse(set)
	query := strings.Join(operands, " ")
	switch {
	case !ok:
		return code
	case (strings.TrimSpace(query) == "") == (*like == ""):
		return e.usage("search", "give a query, or --like ID")
	case !oneOf(*output, "text", "json"):
		return e.usage("search", "--output is text or json")
	}
	body := map[string]any{"limit": *limit, "offset": *offset, "explain": *explain}
	optional := func(name, v string) {
		if v != "" {
			body[name] = v
		}
	}
	optional("query", query)
	optional("like", *like)
	optional("collection", *collection)
	optional("mode", *mode)
	if *group {
		body["group_by"] = "document"
	}
	if *highlight {
		body["highlight"] = true
	}
	if *around > 0 {
		body["context"] = *around
	}
	if *threshold != 0 {
		body["score_threshold"] = *threshold
	}
	if *filter != "" {
		if !json.Valid([]byte(*filter)) {
			return e.usage("search", "--filter is not valid JSON")
		}
		body["filter"] = json.RawMessage(*filter)
	}
	client, err := NewClient(*server, e.Getenv("LOCKSTEP_API_KEY"))
	if err != nil {
		return e.usage("search", "%s", err)
	}
	defer client.Close()
	var raw json.RawMessage
	err = e.patiently(ctx, 3, func() error { return client.call(ctx, http.MethodPost, "/search", body, &raw) })
	if err != nil {
		return e.failure(ctx, "search", err)
	}
	if *output == "json" {
		e.printf("%s\n", raw)
		return ExitOK
	}
	var r searchReply
	if err := json.Unmarshal(raw, &r); err != nil {
		return e.failure(ctx, "search", fmt.Errorf("read the reply: %w", err))
	}
	e.showResults(&r, *offset, *explain)
	return ExitOK
}

type searchReply struct {
	Results []struct {
		ID         string         `json:"id"`
		Document   string         `json:"document"`
		Version    int64          `json:"version"`
		Ordinal    int            `json:"ordinal"`
		Score      float64        `json:"score"`
		Text       string         `json:"text"`
		Metadata   map[string]any `json:"metadata"`
		ChunkCount int            `json:"chunk_count"`
		Before     []neighbour    `json:"before"`
		After      []neighbour    `json:"after"`
		Highlights []string       `json:"highlights"`
		Heads      map[string]struct {
			Rank  int     `json:"rank"`
			Score float64 `json:"score"`
		} `json:"heads"`
	} `json:"results"`
	Mode   string `json:"mode"`
	Fusion struct {
		Method  string    `json:"method"`
		K       int       `json:"k"`
		Weights []float64 `json:"weights"`
	} `json:"fusion"`
	Consistency struct {
		Filtered  int  `json:"filtered"`
		Widened   int  `json:"widened"`
		Truncated bool `json:"truncated"`
	} `json:"consistency"`
	TimingsMS map[string]float64 `json:"timings_ms"`
}

type neighbour struct {
	Ordinal int    `json:"ordinal"`
	Text    string `json:"text"`
}

// snippetLines is how much of a chunk is shown.
const snippetLines = 4

func (e *Env) showResults(r *searchReply, offset int, explain bool) {
	if len(r.Results) == 0 {
		e.printf("Nothing found.\n")
	}
	const indent = "    "
	width := e.width() - len(indent)
	for i, h := range r.Results {
		head := fmt.Sprintf("%2d. %s  chunk %d, version %d  score %.4f", offset+i+1, printable(h.Document), h.Ordinal, h.Version, h.Score)
		if h.ChunkCount > 1 {
			head += fmt.Sprintf("  (%d chunks match)", h.ChunkCount)
		}
		e.printf("%s\n", head)
		for _, n := range h.Before {
			e.printf("%s[%d] %s\n", indent, n.Ordinal, clip(printable(n.Text), width-6))
		}
		for _, line := range wrap(printable(h.Text), width, snippetLines) {
			e.printf("%s%s\n", indent, line)
		}
		for _, n := range h.After {
			e.printf("%s[%d] %s\n", indent, n.Ordinal, clip(printable(n.Text), width-6))
		}
		if len(h.Metadata) > 0 {
			var pairs []string
			for _, k := range slices.Sorted(maps.Keys(h.Metadata)) {
				v, err := encode(h.Metadata[k])
				if err != nil {
					continue
				}
				pairs = append(pairs, k+"="+strings.Trim(string(v), `"`))
			}
			e.printf("%s%s\n", indent, clip(printable(strings.Join(pairs, "  ")), width))
		}
		if len(h.Highlights) > 0 {
			e.printf("%smatched terms: %s\n", indent, printable(strings.Join(h.Highlights, ", ")))
		}
		if explain {
			for _, name := range slices.Sorted(maps.Keys(h.Heads)) {
				e.printf("%s%-8s rank %d, score %.6f\n", indent, name, h.Heads[name].Rank, h.Heads[name].Score)
			}
			e.printf("%schunk %s\n", indent, h.ID)
		}
		e.printf("\n")
	}
	if r.Consistency.Truncated {
		e.printf("The list may be short: the search ran out of time or candidates.\n")
	}
	if explain {
		mode := r.Mode
		if f := r.Fusion; f.Method != "" {
			mode += ", fused by " + f.Method
			if f.K > 0 {
				mode += fmt.Sprintf(" with k = %d", f.K)
			}
			if len(f.Weights) > 0 {
				mode += fmt.Sprintf(" and weights %v", f.Weights)
			}
		}
		e.printf("mode %s; the join removed %d candidates, the query was widened %d times; embed %.1f ms, index %.1f ms, join %.1f ms\n",
			mode, r.Consistency.Filtered, r.Consistency.Widened, r.TimingsMS["embed"], r.TimingsMS["index"], r.TimingsMS["join"])
	}
}

// printable keeps control characters of a document away from the terminal: they could do
// anything there.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069':
			return -1
		}
		return r
	}, s)
}

// wrap breaks text into at most n lines of width runes, at spaces.
func wrap(text string, width, n int) []string {
	var out []string
	var line string
	words := strings.Fields(text)
	for i, word := range words {
		word = clip(word, width)
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) <= width:
			line += " " + word
		default:
			out = append(out, line)
			line = word
			if len(out) == n {
				out[n-1] = clip(out[n-1]+" "+strings.Join(words[i:], " "), width)
				return out
			}
		}
	}
	if line != "" {
		out = append(out, line)
	}
	return out
}

// clip cuts text to width runes and says so.
func clip(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	runes := []rune(s)
	return string(runes[:max(0, width-1)]) + "…"
}

// Package chunk cuts a document's text into chunks.
//
// Owns: where a text is cut. The rules are part of a document's identity: another rule gives
// other chunks, other ids, and every document is embedded again. Golden files hold them still.
//
// Promises: [Split] is a pure function that ends on any input, in time linear in the text (times
// the overlap). Its chunks are exact pieces of the text, in order; between and beside them only
// white space is left out, and only an overlap is repeated. No chunk cuts a rune, none is empty,
// and none has more tokens than the target allows, unless one rune alone has.
//
// Must not: tokenise, do I/O, or know what a model is: the tokens' places come in as spans.
//
// Where to look next: ingest, which calls it; embedder, whose Tokens method makes the spans.
package chunk

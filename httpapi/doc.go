// Package httpapi is Lockstep over HTTP: the service's own contract, the contracts of
// text-embeddings-inference and of OpenAI that its clients already speak, and the pages for
// people.
//
// Owns: the routes, the strict reading of request bodies, the rendering of replies, API keys,
// limits on what one request may cost, access logs and the only table from error kind to
// status. It is the only importer of Echo.
//
// Promises: a handler binds, validates, calls one method of a room and renders. Bad input is
// answered with a problem document that points at the field (RFC 9457), never with a 500 or a
// panic, and costs no data. A body is read under a limit; a stream of documents is read and
// answered in constant memory. Document text, vectors and secrets never reach logs or metrics.
//
// Must not: decide anything about documents, search or repair; speak to a store; read the
// environment.
//
// Where to look next: route.go lists every route, problem.go the errors, openapi.yaml the
// contract in its published form; internal/app builds the [Deps].
package httpapi

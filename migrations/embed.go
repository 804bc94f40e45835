// Package migrations embeds the SQL that builds the lockstep schema, one numbered file per
// step. Owns nothing but the files; store/postgres applies them in order under an advisory
// lock, one transaction each. A file that has been released is never edited.
package migrations

import "embed"

// FS holds NNNN_name.sql files; the number orders them.
//
//go:embed *.sql
var FS embed.FS

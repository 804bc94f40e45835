// Package config is the one place that reads the environment: it turns flags, variables and a
// file into one validated [Config].
//
// Owns: every setting of `lockstep serve` and its relatives, with its default, its three names
// (flag, variable, YAML path) and its bounds; the form of API keys.
//
// Promises: a Config that [Load] returns was checked as a whole, fields against each other,
// before anything was opened. An unknown flag or YAML key, or a value that does not parse, is
// an error that names where it stands. Secrets print as "***" whatever formats them.
//
// Must not: open stores, models or listeners; know how rooms use their settings.
//
// Where to look next: config.go lists the settings, internal/app hands them to the rooms.
package config

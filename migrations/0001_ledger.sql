-- The ledger: what is true. See docs/consistency.md for the protocol that moves these rows.
-- All uuid columns sort bytewise, as Qdrant's scroll does; external ids compare by bytes too.

-- gen and meta_version come from this one sequence. It must stay below 2^53: Qdrant's range
-- filter compares as double. CACHE 1 keeps numbers in the order in which they were taken.
CREATE SEQUENCE gen AS bigint MINVALUE 1 MAXVALUE 9007199254740991 CACHE 1;

-- Exactly one row: who we are, and the Postgres we last took a gen on (promise P8).
CREATE TABLE installation (
    singleton          boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    id                 uuid        NOT NULL,
    system_identifier  text        NOT NULL,
    timeline           bigint      NOT NULL,
    postmaster_start   timestamptz NOT NULL,
    sequence_oid       oid         NOT NULL,
    created_at         timestamptz NOT NULL DEFAULT now()
);

-- Ranges of gen that were jumped over and never handed out. A point of ours whose gen lies in
-- one of them was written under a history this Postgres has lost.
CREATE TABLE gen_gaps (
    lo          bigint PRIMARY KEY,
    hi          bigint NOT NULL CHECK (hi >= lo),
    reason      text   NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE collections (
    id          uuid PRIMARY KEY,
    name        text COLLATE "C" NOT NULL,
    settings    jsonb NOT NULL,
    -- Set while evidence of a rollback stands: no delete runs until it is adopted or discarded.
    stopped_at  timestamptz,
    stop_reason text,
    -- Incarnations of documents of this collection start at least here (raised by an adopted rollback).
    floor_base  integer NOT NULL DEFAULT 0,
    -- Ranges of gen_gaps up to here were adopted for this collection: evidence of a rollback no more.
    adopted_gen bigint NOT NULL DEFAULT 0,
    created_at  timestamptz NOT NULL DEFAULT now(),
    -- Set in the transaction that acknowledges the deletion; its rows are cleared afterwards.
    deleted_at  timestamptz
);
-- A deleted collection's name is free at once, for a collection with another id.
CREATE UNIQUE INDEX collections_name ON collections (name) WHERE deleted_at IS NULL;

CREATE TABLE indexes (
    id            uuid PRIMARY KEY,
    collection_id uuid NOT NULL REFERENCES collections (id),
    qdrant_name   text NOT NULL UNIQUE,
    fingerprint   text NOT NULL,
    layout        jsonb NOT NULL,
    state         text NOT NULL CHECK (state IN ('building', 'serving', 'retired')),
    -- When the Qdrant collection was first known to exist. Until then nothing was ever written to
    -- it, so creating it cannot hide a loss; afterwards nobody creates it again.
    ready_at      timestamptz,
    -- The stamp last written into the index: it tells a clone or an old copy on either side.
    nonce         uuid,
    previous_nonce uuid,
    stamped_at    timestamptz,
    created_at    timestamptz NOT NULL DEFAULT now(),
    retired_at    timestamptz
);
CREATE UNIQUE INDEX indexes_one_serving  ON indexes (collection_id) WHERE state = 'serving';
CREATE UNIQUE INDEX indexes_one_building ON indexes (collection_id) WHERE state = 'building';

-- No foreign keys from here on: the protocol keeps these rows together under the document's row
-- lock, and a key check for each row of a bulk insert would lock the same few parents again and again.
CREATE TABLE documents (
    -- Derived from collection and external id (corpus.DocumentID), so that any set of documents
    -- can be locked in one order.
    id                uuid PRIMARY KEY,
    collection_id     uuid   NOT NULL,
    external_id       text COLLATE "C" NOT NULL,
    target_version    bigint NOT NULL,
    -- NULL: nothing serves (new, or deleted).
    serving_version   bigint,
    deleted_at        timestamptz,
    incarnation_floor integer NOT NULL DEFAULT 0,
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now(),
    UNIQUE (collection_id, external_id)
) WITH (fillfactor = 85);
-- The sweep of documents whose target does not serve yet.
CREATE INDEX documents_unswitched ON documents (collection_id, id)
    WHERE deleted_at IS NULL AND serving_version IS DISTINCT FROM target_version;

-- Rows for the serving and the target version only; everything a result shows comes from the
-- serving version's row.
CREATE TABLE document_versions (
    document_id  uuid   NOT NULL,
    version      bigint NOT NULL,
    content_hash bytea  NOT NULL,
    metadata     jsonb  NOT NULL,
    meta_version bigint NOT NULL,
    -- In order; a chunk's ordinal is its place here.
    chunk_ids    uuid[] NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (document_id, version)
);

-- Every id that was ever used, live or dead, until its tombstone is purged. The primary key
-- decides between an ingest and a reconcile that meet on one id.
CREATE TABLE chunks (
    id            uuid PRIMARY KEY,
    collection_id uuid    NOT NULL,
    -- NULL on the tombstone of a point whose document Postgres does not know.
    document_id   uuid,
    -- NULL once dead: a tombstone keeps ids and hashes only.
    text          text,
    content_hash  bytea,
    occurrence    integer NOT NULL,
    incarnation   integer NOT NULL,
    gen           bigint  NOT NULL,
    born_version  bigint  NOT NULL,
    -- Once set, never cleared.
    died_version  bigint
);
-- Reconcile walks this with index-only scans.
CREATE UNIQUE INDEX chunks_walk ON chunks (collection_id, id) INCLUDE (document_id, gen, died_version);
CREATE INDEX chunks_document ON chunks (document_id);
-- For the highest gen in use, asked for when Postgres restarted. Numbers grow with the table, so
-- a summary of its pages does, at next to no cost for writers.
CREATE INDEX chunks_gen ON chunks USING brin (gen);

-- Vectors that callers brought: whatever Lockstep cannot compute again, Postgres keeps.
CREATE TABLE chunk_vectors (
    chunk_id uuid PRIMARY KEY,
    vectors  bytea NOT NULL
);
ALTER TABLE chunk_vectors ALTER COLUMN vectors SET STORAGE EXTERNAL;

-- (index, chunk) -> state. An unsettled row is the queue; there is no other.
CREATE TABLE index_entries (
    index_id        uuid   NOT NULL,
    chunk_id        uuid   NOT NULL,
    document_id     uuid,
    state           text   NOT NULL CHECK (state IN ('pending', 'indexed', 'failed', 'dead')),
    -- The write a pending entry needs: insert, or rewrite (the point may hold something else).
    need            text   NOT NULL DEFAULT 'insert' CHECK (need IN ('insert', 'rewrite')),
    -- The meta_version the point should hold, and the one it is known to hold.
    want_meta       bigint NOT NULL,
    meta_version    bigint NOT NULL DEFAULT 0,
    -- How often it was ever claimed; never reset. Until the first claim nothing was sent.
    claims          integer NOT NULL DEFAULT 0,
    lease_token     uuid,
    lease_until     timestamptz,
    attempts        integer NOT NULL DEFAULT 0,
    not_before      timestamptz NOT NULL DEFAULT now(),
    last_error      text,
    -- Dead entries: when the point was first read absent; the purge reads once more.
    absent_at       timestamptz,
    changed_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (index_id, chunk_id) INCLUDE (state, meta_version, want_meta)
) WITH (fillfactor = 70);
CREATE INDEX index_entries_queue ON index_entries (index_id, not_before)
    WHERE state = 'pending' OR (state = 'indexed' AND meta_version <> want_meta);
CREATE INDEX index_entries_dying ON index_entries (index_id, not_before)
    WHERE state = 'dead' AND absent_at IS NULL;
CREATE INDEX index_entries_tombs ON index_entries (index_id, absent_at)
    WHERE state = 'dead' AND absent_at IS NOT NULL;
-- Usually empty, so that asking for a document's failures costs nothing. A document's other
-- entries are found through its chunks.
CREATE INDEX index_entries_failed ON index_entries (document_id, index_id) WHERE state = 'failed';

-- Kept for ever, also after a document and its tombstones are gone: no incarnation is ever
-- used twice. Keyed by the hash of the external id, so that a deleted document's name is not kept.
CREATE TABLE incarnation_floors (
    collection_id uuid  NOT NULL,
    external_hash bytea NOT NULL,
    floor         integer NOT NULL,
    PRIMARY KEY (collection_id, external_hash)
);

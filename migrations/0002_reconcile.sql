-- What reconcile needs: buckets of the quick depth, runs with their checkpoints, findings, the
-- brake's counters and the history of stamps.

-- The id bucket of corpus.Bucket (salt = the index's own id): the low 12 bits of the first 32
-- of SHA-256(index id, chunk id). Generated, so that no writer can forget it or disagree.
ALTER TABLE index_entries ADD COLUMN bucket smallint NOT NULL GENERATED ALWAYS AS (
    ((get_byte(sha256(uuid_send(index_id) || uuid_send(chunk_id)), 2) & 15) << 8)
    | get_byte(sha256(uuid_send(index_id) || uuid_send(chunk_id)), 3)
) STORED;
-- Equal keys share one posting list, so the counts of a quick run read few pages.
CREATE INDEX index_entries_bucket ON index_entries (index_id, bucket, state) WHERE state <> 'dead';

CREATE TABLE reconcile_runs (
    id              uuid PRIMARY KEY,
    origin          text NOT NULL CHECK (origin IN ('request', 'scrub', 'hint')),
    state           text NOT NULL CHECK (state IN ('running', 'done', 'failed', 'braked', 'cancelled')),
    stage           smallint NOT NULL DEFAULT 0,
    depth           text NOT NULL CHECK (depth IN ('quick', 'full', 'deep')),
    repair          boolean NOT NULL,
    sweep           boolean NOT NULL,
    force           boolean NOT NULL,
    max_deletes     double precision NOT NULL,
    delete_foreign  text NOT NULL DEFAULT '',
    lo              uuid NOT NULL,
    hi              uuid NOT NULL,
    seeds_only      boolean NOT NULL,
    started_at      timestamptz NOT NULL,
    finished_at     timestamptz,
    cancel_requested boolean NOT NULL DEFAULT false,
    error           text NOT NULL DEFAULT '',
    -- Ids compared, once the run has ended; until then its ranges count.
    compared        bigint NOT NULL DEFAULT 0,
    -- The instance that moves the run from stage to stage; ranges have leases of their own.
    leader_token    uuid,
    leader_until    timestamptz
);
CREATE INDEX reconcile_runs_active ON reconcile_runs (started_at) WHERE state = 'running';

CREATE TABLE reconcile_targets (
    run_id          uuid NOT NULL REFERENCES reconcile_runs (id) ON DELETE CASCADE,
    collection_id   uuid NOT NULL,
    ordinal         integer NOT NULL,
    name            text COLLATE "C" NOT NULL,
    -- Counted in the index when the run began.
    index_points    bigint NOT NULL DEFAULT 0,
    stopped         text NOT NULL DEFAULT '',
    braked          text NOT NULL DEFAULT '',
    active          boolean NOT NULL DEFAULT true,
    finished_at     timestamptz,
    documents       bigint NOT NULL DEFAULT 0,
    expected_points bigint NOT NULL DEFAULT 0,
    indexed_points  bigint NOT NULL DEFAULT 0,
    pending         bigint NOT NULL DEFAULT 0,
    findings        jsonb NOT NULL DEFAULT '{}',
    repaired        jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (run_id, collection_id)
);
-- One run per collection at a time.
CREATE UNIQUE INDEX reconcile_targets_one ON reconcile_targets (collection_id) WHERE active;
CREATE INDEX reconcile_targets_history ON reconcile_targets (collection_id, finished_at);

CREATE TABLE reconcile_ranges (
    run_id        uuid NOT NULL REFERENCES reconcile_runs (id) ON DELETE CASCADE,
    index_id      uuid NOT NULL,
    lo            uuid NOT NULL,
    hi            uuid NOT NULL,
    collection_id uuid NOT NULL,
    cursor        uuid NOT NULL,
    -- The next stage this range has to do.
    stage         smallint NOT NULL,
    compared      bigint NOT NULL DEFAULT 0,
    expected      bigint NOT NULL DEFAULT 0,
    points        bigint NOT NULL DEFAULT 0,
    lease_token   uuid,
    lease_until   timestamptz,
    PRIMARY KEY (run_id, index_id, lo)
);

-- Differences seen once, waiting for the second look.
CREATE TABLE reconcile_suspects (
    run_id   uuid NOT NULL REFERENCES reconcile_runs (id) ON DELETE CASCADE,
    index_id uuid NOT NULL,
    point_id uuid NOT NULL,
    kind     text NOT NULL,
    seen_at  timestamptz NOT NULL,
    looks    integer NOT NULL DEFAULT 0,
    PRIMARY KEY (run_id, index_id, point_id, kind)
);

-- Confirmed differences. point_id is the index's id for the kinds that speak of an index.
CREATE TABLE reconcile_findings (
    run_id        uuid NOT NULL REFERENCES reconcile_runs (id) ON DELETE CASCADE,
    index_id      uuid NOT NULL,
    point_id      uuid NOT NULL,
    kind          text NOT NULL,
    collection_id uuid NOT NULL,
    document      text NOT NULL DEFAULT '',
    detail        text NOT NULL,
    -- open: reported; repairing: the workers were asked; repaired: read back; remains: repair did not help.
    state         text NOT NULL CHECK (state IN ('open', 'repairing', 'repaired', 'remains')),
    seen_at       timestamptz NOT NULL,
    confirmed_at  timestamptz NOT NULL,
    PRIMARY KEY (run_id, index_id, point_id, kind)
);
CREATE INDEX reconcile_findings_state ON reconcile_findings (run_id, index_id, state, point_id);

-- The brake: points reconcile declared dead, per collection and day, over all runs.
CREATE TABLE reconcile_deletes (
    collection_id uuid NOT NULL,
    day           date NOT NULL,
    entered       bigint NOT NULL,
    PRIMARY KEY (collection_id, day)
);

-- Every stamp issued in the last day. A stamp in an index that is as recent as these and not
-- among them was written by another Postgres, or by this one in a history it has lost.
CREATE TABLE index_stamps (
    index_id  uuid NOT NULL REFERENCES indexes (id) ON DELETE CASCADE,
    nonce     uuid NOT NULL,
    issued_at timestamptz NOT NULL,
    PRIMARY KEY (index_id, nonce)
);

-- Where background scrubbing stands, so that the instances share it.
CREATE TABLE reconcile_scrub (
    collection_id uuid PRIMARY KEY REFERENCES collections (id) ON DELETE CASCADE,
    quick_at      timestamptz NOT NULL DEFAULT '-infinity',
    slice_at      timestamptz NOT NULL DEFAULT '-infinity',
    next_slice    integer NOT NULL DEFAULT 0
);

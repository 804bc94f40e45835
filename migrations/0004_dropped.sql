-- The names of Qdrant collections that were retired and dropped. Kept for ever: a request to create
-- one may have been under way when it was dropped, and makes it again whenever it arrives. A name
-- is never used twice, so what carries one of these is nobody's.
CREATE TABLE dropped_indexes (
    qdrant_name text PRIMARY KEY,
    dropped_at  timestamptz NOT NULL DEFAULT now()
);

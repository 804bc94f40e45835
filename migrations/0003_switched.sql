-- When the document last moved to another version. A search whose candidates were read before
-- that instant may have seen only a part of the new version's points, and asks the index again.
ALTER TABLE documents ADD COLUMN switched_at timestamptz;

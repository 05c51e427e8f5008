-- A workflow has at most one default version: the one that new runs get when none is named.
-- The table was there from the start, and nothing wrote to it.
ALTER TABLE workflow_versions ALTER COLUMN is_default SET DEFAULT false;
CREATE UNIQUE INDEX workflow_versions_default ON workflow_versions (workflow) WHERE is_default;

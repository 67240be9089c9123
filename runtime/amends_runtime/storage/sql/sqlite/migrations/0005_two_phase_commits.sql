-- What a participant in doubt is told of a purged saga. 0 and 0: it was no two-phase commit.
-- 2, 3: COMMIT, ABORT.
ALTER TABLE tombstones ADD COLUMN decision INTEGER NOT NULL DEFAULT 0 CHECK (decision IN (0, 2, 3));
ALTER TABLE tombstones ADD COLUMN round INTEGER NOT NULL DEFAULT 0;

-- The incarnations that this store had before it was restored, each time that it was. While meta.restored is set nobody
-- has said that what it knows of them is the truth. An incarnation that stands nowhere here was another copy's.
CREATE TABLE earlier_incarnations (
    incarnation       TEXT    PRIMARY KEY NOT NULL
) STRICT, WITHOUT ROWID;

-- The last saga that a restored store brought with it. Two-phase commits up to it wait until somebody has confirmed it.
ALTER TABLE meta ADD COLUMN restored_through_no INTEGER NOT NULL DEFAULT 0;

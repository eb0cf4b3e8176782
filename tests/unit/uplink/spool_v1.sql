-- A spool as schema version 1 left it, with one row in every table.
CREATE TABLE inbox (
  id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, event_id TEXT NOT NULL, payload BLOB NOT NULL,
  lane INTEGER NOT NULL, received_ms INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
  UNIQUE (task, event_id));
CREATE INDEX inbox_order ON inbox (lane, id);
CREATE TABLE answered (
  id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT NOT NULL, event_id TEXT NOT NULL, UNIQUE (task, event_id));
CREATE TABLE outbox (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, class_seq INTEGER NOT NULL, klass INTEGER NOT NULL, topic TEXT NOT NULL,
  payload BLOB NOT NULL, qos INTEGER NOT NULL, retain INTEGER NOT NULL, content_type TEXT,
  user_properties TEXT NOT NULL, size_bytes INTEGER NOT NULL, queued_ms INTEGER NOT NULL);
CREATE INDEX outbox_class ON outbox (klass, seq);
CREATE TABLE dead_letters (
  id INTEGER PRIMARY KEY AUTOINCREMENT, task TEXT, event_id TEXT, payload BLOB, lane INTEGER NOT NULL,
  received_ms INTEGER NOT NULL, buried_ms INTEGER NOT NULL, code TEXT NOT NULL, kind TEXT NOT NULL,
  detail TEXT NOT NULL);
CREATE TABLE counters (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE totals (name TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO totals VALUES ('inbox', 0), ('outbox', 0), ('outbox_bytes', 0), ('dead_letters', 0);
CREATE TRIGGER inbox_in AFTER INSERT ON inbox BEGIN UPDATE totals SET n = n + 1 WHERE name = 'inbox'; END;
CREATE TRIGGER inbox_out AFTER DELETE ON inbox BEGIN UPDATE totals SET n = n - 1 WHERE name = 'inbox'; END;
CREATE TRIGGER outbox_in AFTER INSERT ON outbox BEGIN
  UPDATE totals SET n = n + 1 WHERE name = 'outbox';
  UPDATE totals SET n = n + new.size_bytes WHERE name = 'outbox_bytes'; END;
CREATE TRIGGER outbox_out AFTER DELETE ON outbox BEGIN
  UPDATE totals SET n = n - 1 WHERE name = 'outbox';
  UPDATE totals SET n = n - old.size_bytes WHERE name = 'outbox_bytes'; END;
CREATE TRIGGER dead_in AFTER INSERT ON dead_letters BEGIN UPDATE totals SET n = n + 1 WHERE name = 'dead_letters'; END;
CREATE TRIGGER dead_out AFTER DELETE ON dead_letters BEGIN UPDATE totals SET n = n - 1 WHERE name = 'dead_letters'; END;
INSERT INTO inbox (task, event_id, payload, lane, received_ms) VALUES ('triage', 'waits', x'7b7d', 1, 1);
INSERT INTO answered (task, event_id) VALUES ('triage', 'answered');
INSERT INTO outbox (class_seq, klass, topic, payload, qos, retain, user_properties, size_bytes, queued_ms)
  VALUES (1, 0, 'plant', x'7b7d', 1, 0, '[]', 7, 1);
INSERT INTO dead_letters (task, event_id, payload, lane, received_ms, buried_ms, code, kind, detail)
  VALUES ('triage', 'dead', x'7b7d', 1, 1, 1, 'event.not_json', 'refused', 'no');
INSERT INTO counters VALUES ('event.duplicate', 3);
INSERT INTO totals VALUES ('seq.decision', 1);
PRAGMA user_version = 1;

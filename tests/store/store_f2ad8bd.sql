BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE hpo_attempts (
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	worker_id VARCHAR(64) NOT NULL, 
	began_at FLOAT NOT NULL, 
	ended_at FLOAT, 
	furthest INTEGER NOT NULL, 
	went_on_from INTEGER, 
	outcome TEXT, 
	error TEXT, 
	note TEXT, 
	PRIMARY KEY (study_id, number, attempt)
);
INSERT INTO "hpo_attempts" VALUES(1,0,1,'784144735de6',1.79597420761600446706e+09,1.79597420783398747448e+09,0,0,'complete',NULL,NULL);
INSERT INTO "hpo_attempts" VALUES(1,1,1,'784144735de6',1.79597420786001825332e+09,1.79597420793799018856e+09,0,NULL,'out of memory','Traceback',NULL);
INSERT INTO "hpo_attempts" VALUES(1,2,1,'784144735de6',1.79597420793899583812e+09,1.79597420802698588371e+09,0,0,'released',NULL,NULL);
CREATE TABLE hpo_epochs (
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	epoch INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	metrics TEXT NOT NULL, 
	PRIMARY KEY (study_id, number, epoch)
);
INSERT INTO "hpo_epochs" VALUES(1,0,1,1,'{"val_accuracy": 0.5}');
INSERT INTO "hpo_epochs" VALUES(1,0,2,1,'{"val_accuracy": 0.75}');
INSERT INTO "hpo_epochs" VALUES(1,1,1,1,'{"val_accuracy": 0.25}');
INSERT INTO "hpo_epochs" VALUES(1,2,1,1,'{"val_accuracy": 0.6}');
CREATE TABLE hpo_meta (
	"key" VARCHAR(64) NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "hpo_meta" VALUES('schema_version','3');
CREATE TABLE hpo_slots (
	study_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	kind VARCHAR(16) DEFAULT 'search' NOT NULL, 
	replicate INTEGER, 
	tested INTEGER, 
	state VARCHAR(16) NOT NULL, 
	given TEXT NOT NULL, 
	trial_id INTEGER, 
	attempt INTEGER NOT NULL, 
	furthest INTEGER NOT NULL, 
	pruned_at INTEGER, 
	losses INTEGER NOT NULL, 
	failures INTEGER DEFAULT '0' NOT NULL, 
	alone INTEGER DEFAULT '0' NOT NULL, 
	worker_id VARCHAR(64), 
	claimed_at FLOAT, 
	lease_until FLOAT, 
	ended_at FLOAT, 
	reason TEXT, 
	error TEXT, 
	failure_key TEXT, 
	PRIMARY KEY (study_id, number)
);
INSERT INTO "hpo_slots" VALUES(1,0,'search',NULL,NULL,'complete','{"lr": 0.1}',1,1,2,NULL,0,0,0,'784144735de6',1.79597420761600446706e+09,NULL,1.79597420782099223132e+09,'trained for 2 epochs',NULL,NULL);
INSERT INTO "hpo_slots" VALUES(1,1,'search',NULL,NULL,'waiting','{"lr": 0.2}',2,1,1,NULL,0,0,1,NULL,1.79597420786001825332e+09,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "hpo_slots" VALUES(1,2,'search',NULL,NULL,'waiting','{"lr": 0.3}',3,1,1,NULL,0,0,0,NULL,1.79597420793899583812e+09,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "hpo_slots" VALUES(1,3,'search',NULL,NULL,'waiting','{"lr": 0.4}',NULL,0,0,NULL,0,0,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE hpo_studies (
	study_id INTEGER NOT NULL, 
	spec TEXT NOT NULL, 
	facts TEXT NOT NULL, 
	created_at FLOAT NOT NULL, 
	started_at FLOAT NOT NULL, 
	stop VARCHAR(16), 
	stop_reason TEXT, 
	PRIMARY KEY (study_id)
);
INSERT INTO "hpo_studies" VALUES(1,'{"name": "s", "search": {"sampler": "grid", "seed": 0, "retries": 1, "space": {"lr": [0.1, 0.2, 0.3, 0.4]}, "try_first": []}, "pruner": {"name": "none"}, "training": {"epochs": 2, "seed": 0}, "objective": {"function": "loop:train", "metric": "val_accuracy", "direction": "maximize"}, "engine": {"lanes": "auto"}, "checkpoints": {"keep_best": 1}}','{"num_val": 7, "uid": "28a89170"}',1.79597420756599450118e+09,1.79597420756599450118e+09,NULL,NULL);
CREATE TABLE hpo_workers (
	worker_id VARCHAR(64) NOT NULL, 
	study_id INTEGER NOT NULL, 
	host TEXT NOT NULL, 
	machine TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	pid_started FLOAT NOT NULL, 
	device TEXT NOT NULL, 
	started_at FLOAT NOT NULL, 
	seen_at FLOAT NOT NULL, 
	ended_at FLOAT, 
	PRIMARY KEY (worker_id)
);
INSERT INTO "hpo_workers" VALUES('784144735de6',1,'here','elsewhere',12993,4.87961999988555908186e+03,'cpu',1.79597420760401487349e+09,1.79597420760401487349e+09,NULL);
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'s');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MAXIMIZE',1,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_system_attributes" VALUES(1,1,'study:metric_names','["val_accuracy"]');
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_intermediate_values" VALUES(1,1,1,0.5,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(2,1,2,0.75,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(3,2,1,0.25,'FINITE');
INSERT INTO "trial_intermediate_values" VALUES(4,3,1,0.6,'FINITE');
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'lr',0.1,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.1, "high": 0.4, "log": false}}');
INSERT INTO "trial_params" VALUES(2,2,'lr',0.2,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.1, "high": 0.4, "log": false}}');
INSERT INTO "trial_params" VALUES(3,3,'lr',0.3,'{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.1, "high": 0.4, "log": false}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_system_attributes" VALUES(1,1,'fixed_params','{"lr": 0.1}');
INSERT INTO "trial_system_attributes" VALUES(2,2,'fixed_params','{"lr": 0.2}');
INSERT INTO "trial_system_attributes" VALUES(3,3,'fixed_params','{"lr": 0.3}');
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'seed','1');
INSERT INTO "trial_user_attributes" VALUES(2,1,'ended','"complete: trained for 2 epochs"');
INSERT INTO "trial_user_attributes" VALUES(3,2,'seed','2');
INSERT INTO "trial_user_attributes" VALUES(4,3,'seed','3');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,0.75,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-29 17:43:27.627465','2026-11-29 17:43:27.849562');
INSERT INTO "trials" VALUES(2,1,1,'RUNNING','2026-11-29 17:43:27.861354',NULL);
INSERT INTO "trials" VALUES(3,2,1,'RUNNING','2026-11-29 17:43:27.941207',NULL);
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
CREATE INDEX hpo_slots_by_state ON hpo_slots (study_id, state, number);
CREATE INDEX hpo_workers_by_study ON hpo_workers (study_id);
COMMIT;

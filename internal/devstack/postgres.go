package devstack

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const (
	pgUser     = "lockstep"
	pgDatabase = "lockstep"
)

// postgres is one embedded Postgres being set up.
type postgres struct {
	dir      *dataDir
	data     string // PGDATA
	bin      string
	as       *identity
	password string
	log      *slog.Logger
}

func startPostgres(ctx context.Context, cfg Config, dir *dataDir, log *slog.Logger) (dsn string, ch *child, where string, err error) {
	fail := func(err error) (string, *child, string, error) { return "", nil, "", err }
	p := &postgres{dir: dir, data: dir.join("postgres"), log: log}
	if p.as, err = pickIdentity(p.data); err != nil {
		return fail(err)
	}
	if p.as != nil {
		if err := os.Chmod(dir.path, 0o711); err != nil { // pass, not list
			return fail(err)
		}
		if blocked, err := p.as.reaches(p.data); err != nil {
			return fail(err)
		} else if blocked != "" {
			return fail(corpus.Errorf(corpus.Unavailable, "data_dir_unreachable",
				"Postgres cannot run as root, and the user %s it would run as may not pass %s; choose a directory such as /var/lib/lockstep with --data-dir, or set DATABASE_URL", p.as.name, blocked))
		}
	}
	version, err := p.dataVersion()
	if err != nil {
		return fail(err)
	}
	if p.bin, err = findPostgres(ctx, cfg.PostgresBin, version, p.as, dir, log); err != nil {
		return fail(err)
	}
	if err := p.stopOrphan(ctx); err != nil {
		return fail(err)
	}
	if err := p.credentials(ctx, version == 0); err != nil {
		return fail(err)
	}
	if version == 0 {
		if err := p.initialise(ctx); err != nil {
			return fail(err)
		}
	}
	// Another process may take the port between our asking and Postgres' binding.
	for try := 1; ; try++ {
		dsn, ch, err = p.start(ctx, cfg.StartTimeout)
		if err == nil {
			break
		}
		if try == 3 || ctx.Err() != nil || !strings.Contains(err.Error(), "could not bind") {
			return fail(err)
		}
	}
	who := "this user"
	if p.as != nil {
		who = "user " + p.as.name
	}
	return dsn, ch, fmt.Sprintf("Postgres (%s, as %s), data in %s, for evaluation: set DATABASE_URL for your own", p.bin, who, p.data), nil
}

// dataVersion is the major version that made the database; 0 when there is none yet.
func (p *postgres) dataVersion() (int, error) {
	raw, err := os.ReadFile(filepath.Join(p.data, "PG_VERSION"))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(p.data); err == nil {
			return 0, corpus.Errorf(corpus.Conflict, "data_dir_damaged", "%s exists but holds no database (no PG_VERSION); move it away to start with an empty one", p.data)
		}
		return 0, nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return 0, corpus.Wrap(corpus.Conflict, "data_dir_foreign", "the database in "+p.data+" belongs to another user; start Lockstep as the user that made it, or choose another directory with --data-dir", err)
	}
	if err != nil {
		return 0, err
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || v < 10 {
		return 0, corpus.Errorf(corpus.Conflict, "data_dir_damaged", "%s/PG_VERSION is not a version of Postgres", p.data)
	}
	return v, nil
}

// stopOrphan ends a postmaster that a killed Lockstep left on this directory. Ours is the
// only lock on it, so no other Lockstep can be using it.
func (p *postgres) stopOrphan(ctx context.Context) error {
	name := filepath.Join(p.data, "postmaster.pid")
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	pid, _ := strconv.Atoi(strings.TrimSpace(first))
	if pid <= 1 {
		return nil // torn; Postgres says itself what it thinks of it
	}
	if err := stopOrphan(ctx, pid, "postgres", p.data, syscall.SIGINT, syscall.SIGQUIT, p.log); err != nil {
		return err
	}
	// Postgres takes any live process of that number for a postmaster. It is none: what ran
	// here was just checked or ended, so a reused number must not keep the database down.
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// credentials reads the password, or makes one. A lost password of a database that exists is
// replaced in single-user mode.
func (p *postgres) credentials(ctx context.Context, fresh bool) (err error) {
	const name = "postgres.password"
	_, statErr := os.Lstat(p.dir.join(name))
	if p.password, err = p.dir.secret(name); err != nil || fresh || statErr == nil {
		return err
	}
	p.log.WarnContext(ctx, "the embedded Postgres' password was lost; setting a new one")
	cmd := p.command("postgres", "--single", "-D", p.data, "postgres")
	cmd.Stdin = strings.NewReader("ALTER ROLE " + pgUser + " PASSWORD '" + p.password + "'\n") // hex: nothing to quote
	if err := runTool(ctx, cmd); err != nil {
		return errors.Join(err, os.Remove(p.dir.join(name))) // so that the next start tries again
	}
	return nil
}

// initialise makes the database beside its place and moves it there when it is complete, so
// that a start cut short leaves nothing that looks like a database.
func (p *postgres) initialise(ctx context.Context) error {
	p.log.InfoContext(ctx, "making the embedded Postgres database", "dir", p.data)
	work := p.dir.join("postgres.new")
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	secret := filepath.Join(work, "password")
	if err := os.WriteFile(secret, []byte(p.password+"\n"), 0o600); err != nil {
		return err
	}
	if err := p.as.give(work); err != nil {
		return err
	}
	data := filepath.Join(work, "data")
	err := runTool(ctx, p.command("initdb", "-D", data, "-U", pgUser, "--pwfile="+secret,
		"--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--data-checksums"))
	if err != nil {
		return errors.Join(err, os.RemoveAll(work))
	}
	if err := os.Rename(data, p.data); err != nil {
		return err
	}
	return os.RemoveAll(work)
}

func (p *postgres) command(tool string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(p.bin, tool), args...)
	cmd.Dir = "/" // ours may be one that the identity cannot enter
	cmd.Env = environment(p.dir.path)
	cmd.SysProcAttr = attributes(p.as, syscall.SIGINT)
	return cmd
}

// start runs the server on a free port and returns when the database lockstep answers.
func (p *postgres) start(ctx context.Context, timeout time.Duration) (string, *child, error) {
	port, err := freePort()
	if err != nil {
		return "", nil, err
	}
	logFile, err := openLog(p.dir.join("log", "postgres.log"))
	if err != nil {
		return "", nil, err
	}
	ch := &child{
		name: "the embedded Postgres", log: logFile, logger: p.log,
		polite: syscall.SIGINT, urgent: syscall.SIGQUIT, // fast, immediate shutdown
		command: func() *exec.Cmd {
			args := []string{"-D", p.data}
			for _, s := range []string{
				"listen_addresses=127.0.0.1", "port=" + strconv.Itoa(port), "unix_socket_directories=",
				"logging_collector=off", "log_destination=stderr",
				// No statements, parameters or row contents: they may hold document text.
				"log_statement=none", "log_min_duration_statement=-1", "log_min_error_statement=panic", "log_error_verbosity=terse",
			} {
				args = append(args, "-c", s)
			}
			return p.command("postgres", args...)
		},
	}
	at := func(database string) string {
		u := url.URL{
			Scheme: "postgres", User: url.UserPassword(pgUser, p.password), Host: "127.0.0.1:" + strconv.Itoa(port),
			Path: "/" + database, RawQuery: "sslmode=disable",
		}
		return u.String()
	}
	ch.supervise()
	wait, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err = ch.waitReady(wait, func(ctx context.Context) error { return createDatabase(ctx, at("postgres")) })
	if err != nil {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		return "", nil, errors.Join(err, ch.stop(stop))
	}
	return at(pgDatabase), ch, nil
}

// createDatabase makes the database lockstep if it is not there; succeeding also shows that
// the server answers and takes our password.
func createDatabase(ctx context.Context, admin string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, admin)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", pgDatabase).Scan(&exists); err != nil || exists {
		return err
	}
	_, err = conn.Exec(ctx, "CREATE DATABASE "+pgDatabase)
	return err
}

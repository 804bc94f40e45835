package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

// oldestPostgres that Lockstep's migrations and statements run on.
const oldestPostgres = 14

// systemBins are where distributions put versions of Postgres that are not on PATH.
var systemBins = []string{
	"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin",
	"/opt/homebrew/opt/postgresql*/bin", "/usr/local/opt/postgresql*/bin", "/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
}

// findPostgres returns a directory with initdb and postgres of the version that made the
// database, or of any supported one, newest first, when version is 0: the one asked for, on
// PATH, by pg_config, in the system's places, or fetched.
func findPostgres(ctx context.Context, asked string, version int, as *identity, dir *dataDir, log *slog.Logger) (string, error) {
	candidates := []string{asked}
	if asked == "" {
		candidates = postgresDirs(ctx)
	}
	type found struct {
		bin   string
		major int
	}
	var all []found
	var unreachable []string
	for _, bin := range candidates {
		major, err := postgresMajor(ctx, bin)
		if err != nil {
			if asked != "" {
				return "", corpus.Errorf(corpus.Unavailable, "no_postgres", "%s has no usable Postgres (initdb and postgres): %v", bin, err)
			}
			continue
		}
		if blocked, err := as.reaches(filepath.Join(bin, "postgres")); err != nil || blocked != "" {
			unreachable = append(unreachable, bin)
			continue
		}
		all = append(all, found{bin, major})
	}
	if version == 0 {
		slices.SortStableFunc(all, func(a, b found) int { return b.major - a.major })
		if len(all) > 0 && all[0].major >= oldestPostgres {
			return all[0].bin, nil
		}
	}
	for _, f := range all {
		if f.major == version {
			return f.bin, nil
		}
	}
	if asked != "" {
		return "", corpus.Errorf(corpus.Conflict, "postgres_version",
			"%s is Postgres %d; %s was made by Postgres %d, and one version cannot read another's files: install version %d, or choose another directory with --data-dir and ingest again", asked, all[0].major, dir.join("postgres"), version, version)
	}
	bin, err := fetchPostgres(ctx, "", version, dir, log)
	if err == nil {
		return bin, nil
	}
	var have []string
	for _, f := range all {
		have = append(have, fmt.Sprintf("%d in %s", f.major, f.bin))
	}
	for _, u := range unreachable {
		have = append(have, u+" (not reachable for the user that would run it)")
	}
	if len(have) == 0 {
		have = []string{"none"}
	}
	if version != 0 {
		return "", corpus.Wrap(corpus.Conflict, "postgres_version",
			fmt.Sprintf("%s was made by Postgres %d, which is neither installed (found: %s) nor could be fetched; install it, or choose another directory with --data-dir and ingest again", dir.join("postgres"), version, strings.Join(have, ", ")), err)
	}
	return "", corpus.Wrap(corpus.Unavailable, "no_postgres",
		fmt.Sprintf("no Postgres of version %d or later is installed (found: %s) and none could be fetched; install the package postgresql, or set DATABASE_URL", oldestPostgres, strings.Join(have, ", ")), err)
}

func postgresDirs(ctx context.Context) []string {
	var dirs []string
	add := func(dir string) {
		if dir != "" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	if path, err := exec.LookPath("postgres"); err == nil {
		// On Debian and with Homebrew this is a link into the versioned directory.
		if real, err := filepath.EvalSymlinks(path); err == nil {
			add(filepath.Dir(real))
		}
	}
	if out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output(); err == nil {
		add(strings.TrimSpace(string(out)))
	}
	for _, pattern := range systemBins {
		matches, err := filepath.Glob(pattern)
		if err != nil {
			continue // only a malformed pattern fails, and these are not
		}
		for _, m := range matches {
			add(m)
		}
	}
	return dirs
}

var majorPattern = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

func postgresMajor(ctx context.Context, bin string) (int, error) {
	if _, err := os.Stat(filepath.Join(bin, "initdb")); err != nil {
		return 0, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "postgres"), "--version").Output()
	if err != nil {
		return 0, err
	}
	m := majorPattern.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("it calls itself %q", strings.TrimSpace(string(out)))
	}
	return strconv.Atoi(string(m[1]))
}

// fetchable versions of the embedded-postgres library.
var fetchable = map[int]embeddedpostgres.PostgresVersion{
	14: embeddedpostgres.V14, 15: embeddedpostgres.V15, 16: embeddedpostgres.V16, 17: embeddedpostgres.V17, 18: embeddedpostgres.V18,
}

// fetchedMajor is what a fresh machine gets.
const fetchedMajor = 17

// fetchPostgres gets binaries through the embedded-postgres library, which verifies their
// checksum, and keeps them in the data directory, where the user that runs Postgres can reach
// them. An empty repository is the library's own.
func fetchPostgres(ctx context.Context, repository string, version int, dir *dataDir, log *slog.Logger) (string, error) {
	if version == 0 {
		version = fetchedMajor
	}
	pinned, ok := fetchable[version]
	if !ok {
		return "", fmt.Errorf("there are no binaries of Postgres %d to fetch", version)
	}
	root := dir.join("bin", "postgres-"+strconv.Itoa(version))
	bin := filepath.Join(root, "bin")
	if _, err := postgresMajor(ctx, bin); err == nil {
		return bin, nil
	}
	log.InfoContext(ctx, "fetching Postgres; this is done once", "version", string(pinned), "to", root)
	work, err := os.MkdirTemp(dir.path, "fetch-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	// The library only fetches on its way to a start. The data directory it is given looks
	// initialised but is not, so after fetching and unpacking it stops with an error, which is
	// judged by what it left.
	data := filepath.Join(work, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(data, "PG_VERSION"), []byte(strconv.Itoa(version)+"\n"), 0o600); err != nil {
		return "", err
	}
	port, err := freePort()
	if err != nil {
		return "", err
	}
	fetched := filepath.Join(work, "unpacked")
	conf := embeddedpostgres.DefaultConfig().
		Version(pinned).Port(uint32(port)).Logger(io.Discard).
		CachePath(filepath.Join(work, "cache")).RuntimePath(filepath.Join(work, "run")).
		BinariesPath(fetched).DataPath(data)
	if repository != "" {
		conf = conf.BinaryRepositoryURL(repository)
	}
	db := embeddedpostgres.NewDatabase(conf)
	done := make(chan error, 1)
	go func() { done <- db.Start() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		// The library cannot be interrupted. The process is on its way out, and the
		// goroutine with it; what it still writes lies in work.
		return "", context.Cause(ctx)
	}
	if err == nil {
		err = errors.Join(errors.New("the library started a server on a directory that holds none"), db.Stop())
		return "", err
	}
	if _, merr := postgresMajor(ctx, filepath.Join(fetched, "bin")); merr != nil {
		return "", fmt.Errorf("fetching Postgres %s: %w", pinned, err)
	}
	if err := os.MkdirAll(filepath.Dir(root), 0o755); err != nil {
		return "", err
	}
	if err := os.RemoveAll(root); err != nil {
		return "", err
	}
	return bin, os.Rename(fetched, root)
}

package cachedir_test

import (
	"strings"
	"testing"

	"github.com/lockstep-db/lockstep/internal/config/cachedir"
)

func TestDefault(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name      string
		xdg, home string
		want      string
		fails     bool
	}{
		{name: "xdg wins", xdg: "/x/cache", home: "/home/u", want: "/x/cache/lockstep"},
		{name: "home", home: "/home/u", want: "/home/u/.cache/lockstep"},
		{name: "relative xdg is ignored", xdg: "cache", home: "/home/u", want: "/home/u/.cache/lockstep"},
		{name: "nothing set", fails: true},
		{name: "relative home", home: "u", fails: true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			env := map[string]string{"XDG_CACHE_HOME": c.xdg, "HOME": c.home}
			got, err := cachedir.Default(func(k string) string { return env[k] })
			if (err != nil) != c.fails {
				t.Fatalf("error %v, expected failure %v", err, c.fails)
			}
			if got.Root != c.want {
				t.Fatalf("root %q, expected %q", got.Root, c.want)
			}
		})
	}
}

func TestNamesCarryVersionAndPlatform(t *testing.T) {
	t.Parallel()
	l := cachedir.Layout{Root: "/c"}
	if got := l.ONNXRuntime("linux", "arm64"); !strings.HasSuffix(got, "linux-arm64/libonnxruntime.so."+cachedir.ONNXRuntimeVersion) {
		t.Errorf("linux library at %q", got)
	}
	if got := l.ONNXRuntime("darwin", "arm64"); !strings.HasSuffix(got, "darwin-arm64/libonnxruntime."+cachedir.ONNXRuntimeVersion+".dylib") {
		t.Errorf("darwin library at %q", got)
	}
	if a, b := l.Tokenizers("k1", "linux", "amd64"), l.Tokenizers("k2", "linux", "amd64"); a == b {
		t.Errorf("two keys share the folder %q", a)
	}
	if got := l.MiniLM(); !strings.HasSuffix(got, cachedir.MiniLMVersion) {
		t.Errorf("checkpoint at %q", got)
	}
}

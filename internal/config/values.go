package config

import (
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// masked is what secrets print as.
const masked = "***"

// Secret is text that never prints. Convert to string to use it.
type Secret string

// String hides the value from %v and %s.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return masked
}

// GoString hides the value from %#v.
func (s Secret) GoString() string { return strconv.Quote(s.String()) }

// LogValue hides the value from slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText hides the value from encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// maskURL hides the password of a URL or of a key=value list, and keeps what tells a person
// which server it is.
func maskURL(s string) string {
	if s == "" {
		return ""
	}
	if u, err := url.Parse(s); err == nil && u.Scheme != "" && u.Host != "" {
		if _, has := u.User.Password(); has {
			u.User = url.User(u.User.Username())
			s := u.String()
			return strings.Replace(s, "@", ":"+masked+"@", 1)
		}
		q := u.Query()
		if q.Has("password") {
			q.Set("password", masked)
			u.RawQuery = q.Encode()
		}
		return u.String()
	}
	return masked
}

// Bytes is a size. It reads 1048576, 1MiB, 1MB, 16KiB and the like.
type Bytes int64

var byteUnits = []struct {
	suffix string
	factor float64
}{
	{"kib", 1 << 10}, {"mib", 1 << 20}, {"gib", 1 << 30},
	{"kb", 1e3}, {"mb", 1e6}, {"gb", 1e9}, {"b", 1}, {"", 1},
}

func parseBytes(s string) (Bytes, error) {
	low := strings.ToLower(strings.TrimSpace(s))
	for _, u := range byteUnits {
		number, ok := strings.CutSuffix(low, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if err != nil || !(n >= 0) || n*u.factor > 1<<62 {
			break
		}
		return Bytes(n * u.factor), nil
	}
	return 0, fmt.Errorf("%q is not a size such as 1048576, 16MiB or 1GB", s)
}

// String renders the size with the largest unit that divides it.
func (b Bytes) String() string {
	for _, u := range []struct {
		name string
		size Bytes
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if b >= u.size && b%u.size == 0 {
			return strconv.FormatInt(int64(b/u.size), 10) + u.name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// APIKey is one key of the service.
type APIKey struct {
	Name   string
	Scopes []string
	Secret Secret
}

// APIKeys prints names and scopes only.
type APIKeys []APIKey

// minSecret is the shortest secret that is accepted: 16 random characters cannot be guessed.
const minSecret = 16

// Scopes are those of the contract.
var scopes = []string{"read", "write", "admin"}

// parseAPIKey reads name:scope+scope:secret. Errors never repeat the secret.
func parseAPIKey(s string) (APIKey, error) {
	name, rest, ok1 := strings.Cut(s, ":")
	list, secret, ok2 := strings.Cut(rest, ":")
	if !ok1 || !ok2 || name == "" {
		return APIKey{}, fmt.Errorf("an API key has the form name:scope+scope:secret, such as loader:read+write:SECRET")
	}
	k := APIKey{Name: name, Scopes: strings.Split(list, "+"), Secret: Secret(secret)}
	for _, sc := range k.Scopes {
		if !slices.Contains(scopes, sc) {
			return APIKey{}, fmt.Errorf("API key %s: the scope %q is none of read, write and admin", name, sc)
		}
	}
	if len(secret) < minSecret {
		return APIKey{}, fmt.Errorf("API key %s: its secret has %d characters; use at least %d random ones", name, len(secret), minSecret)
	}
	for i := range len(secret) {
		if secret[i] <= ' ' || secret[i] > '~' {
			return APIKey{}, fmt.Errorf("API key %s: its secret must be printable ASCII without spaces, because it travels in a header", name)
		}
	}
	return k, nil
}

// parseAPIKeys reads several keys, separated by white space or commas; with comments, also
// lines of a file.
func parseAPIKeys(text string, comments bool) (APIKeys, error) {
	var out APIKeys
	for line := range strings.Lines(text) {
		if comments && strings.HasPrefix(strings.TrimSpace(line), "#") {
			continue
		}
		for _, one := range strings.FieldsFunc(line, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' || r == '\n' || r == '\r' }) {
			k, err := parseAPIKey(one)
			if err != nil {
				return nil, err
			}
			out = append(out, k)
		}
	}
	return out, nil
}

// String names the keys without their secrets.
func (ks APIKeys) String() string {
	names := make([]string, len(ks))
	for i, k := range ks {
		names[i] = k.Name + ":" + strings.Join(k.Scopes, "+") + ":" + masked
	}
	return strings.Join(names, " ")
}

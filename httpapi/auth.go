package httpapi

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/labstack/echo/v4"
	"golang.org/x/time/rate"
)

// Scope is what a key may do. The admin scope includes the others; write does not include
// read, so that a loader's key cannot read documents back.
type Scope string

// The scopes of the contract.
const (
	// Public routes need no key.
	Public Scope = ""
	Read   Scope = "read"
	Write  Scope = "write"
	Admin  Scope = "admin"
)

// Key is one API key. Name appears in access logs; Secret never does.
type Key struct {
	Name   string
	Scopes []Scope
	Secret string
}

// keyring holds hashes only, so a dump of memory after start-up shows no secrets of ours, and
// comparisons are of equal length.
type keyring struct {
	keys []ringKey
}

type ringKey struct {
	name    string
	scopes  []Scope
	hash    [sha256.Size]byte
	limiter *rate.Limiter // nil without a rate limit
}

func newKeyring(keys []Key, perSecond float64, burst int) *keyring {
	r := &keyring{}
	for _, k := range keys {
		rk := ringKey{name: k.Name, scopes: k.Scopes, hash: sha256.Sum256([]byte(k.Secret))}
		if perSecond > 0 {
			rk.limiter = rate.NewLimiter(rate.Limit(perSecond), max(1, burst))
		}
		r.keys = append(r.keys, rk)
	}
	return r
}

// find compares the secret with every key in constant time, whichever matches.
func (r *keyring) find(secret string) *ringKey {
	hash := sha256.Sum256([]byte(secret))
	found := -1
	for i := range r.keys {
		if subtle.ConstantTimeCompare(hash[:], r.keys[i].hash[:]) == 1 {
			found = i
		}
	}
	if found < 0 {
		return nil
	}
	return &r.keys[found]
}

func (k *ringKey) may(s Scope) bool {
	return s == Public || slices.Contains(k.scopes, s) || slices.Contains(k.scopes, Admin)
}

// secretOf takes the key from the Authorization header: a bearer token, or, for pages, which
// a browser opens without one, the password of basic authentication.
func secretOf(r *http.Request, isPage bool) (secret string, given bool) {
	h := r.Header.Get("Authorization")
	if h == "" {
		return "", false
	}
	scheme, value, _ := strings.Cut(h, " ")
	value = strings.TrimSpace(value)
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		return value, true
	case isPage && strings.EqualFold(scheme, "Basic"):
		raw, err := base64.StdEncoding.DecodeString(value)
		if err != nil {
			return "", true
		}
		_, password, _ := strings.Cut(string(raw), ":")
		return password, true
	}
	return "", true
}

const ctxKeyName = "lockstep.key"

// authorise lets a request through when its key has the route's scope. Without keys, the
// service listens on loopback only, and everyone there may do everything; but then the Host
// header must be loopback too, or a web page could reach us under a name of its own that
// resolves to 127.0.0.1.
func (s *Server) authorise(rt *route) echo.MiddlewareFunc {
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			r := c.Request()
			if len(s.keys.keys) == 0 {
				if !loopbackHost(r.Host) {
					return refuse(http.StatusForbidden, "host_not_allowed",
						"without API keys the service answers only to loopback names, not to this Host; configure API keys to serve it under another name")
				}
				return s.sameOrigin(next)(c)
			}
			if rt.scope == Public {
				return next(c)
			}
			secret, given := secretOf(r, rt.flavour == page)
			if !given {
				return s.unauthorised(c, rt, "an API key is needed: Authorization: Bearer KEY")
			}
			k := s.keys.find(secret)
			if k == nil {
				return s.unauthorised(c, rt, "the API key is not known")
			}
			c.Set(ctxKeyName, k.name)
			if !k.may(rt.scope) {
				return refuse(http.StatusForbidden, "forbidden", "this key lacks the scope %q", string(rt.scope))
			}
			if k.limiter != nil && !k.limiter.Allow() {
				s.m.rejected.WithLabelValues("rate_limited").Inc()
				return refuse(http.StatusTooManyRequests, "rate_limited", "this key's rate limit is used up; retry after the given time")
			}
			return s.sameOrigin(next)(c)
		}
	}
}

// sameOrigin refuses what a browser sends on behalf of another site: it may carry basic
// authentication, or reach a service without keys, without its owner's wish.
func (s *Server) sameOrigin(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		if err := s.origin.Check(c.Request()); err != nil {
			p := refuse(http.StatusForbidden, "cross_origin", "requests that change something are not accepted from another site's page")
			p.cause = err
			return p
		}
		return next(c)
	}
}

func (s *Server) unauthorised(c echo.Context, rt *route, detail string) error {
	challenge := `Bearer realm="lockstep"`
	if rt.flavour == page {
		challenge = `Basic realm="Lockstep: any user name, an admin API key as the password", charset="UTF-8"`
	}
	c.Response().Header().Set("WWW-Authenticate", challenge)
	return refuse(http.StatusUnauthorized, "unauthorized", "%s", detail)
}

func loopbackHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.ToLower(strings.Trim(host, "[]")), ".")
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

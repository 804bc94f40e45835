package httpapi

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/labstack/echo/v4"
)

// readyTime bounds one readiness check, so that a hanging store is "not ready", not a hang.
const readyTime = 5 * time.Second

func (s *Server) healthz(c echo.Context) error {
	return writeJSON(c, http.StatusOK, struct {
		Status string `json:"status"`
	}{"alive"})
}

type checkJSON struct {
	Name   string `json:"name"`
	Ready  bool   `json:"ready"`
	Detail string `json:"detail,omitempty"`
}

// readyz answers 200 only when everything that a request may need answers.
func (s *Server) readyz(c echo.Context) error {
	if s.draining.Load() {
		p := refuse(http.StatusServiceUnavailable, "shutting_down", "the service is shutting down")
		p.Checks = []checkJSON{{Name: "service", Detail: "shutting down"}}
		return p
	}
	checks, ready := s.checkHealth(c.Request().Context())
	if !ready {
		var missing []string
		for _, ch := range checks {
			if !ch.Ready {
				missing = append(missing, ch.Name+": "+ch.Detail)
			}
		}
		p := refuse(http.StatusServiceUnavailable, "not_ready", "not ready: %s", strings.Join(missing, "; "))
		p.Checks = checks
		return p
	}
	return writeJSON(c, http.StatusOK, struct {
		Status string      `json:"status"`
		Checks []checkJSON `json:"checks"`
	}{"ready", checks})
}

// checkHealth asks every component once, within readyTime.
func (s *Server) checkHealth(ctx context.Context) (checks []checkJSON, ready bool) {
	ctx, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	ready, checks = true, []checkJSON{}
	for _, ch := range s.deps.Health.Checks(ctx) {
		one := checkJSON{Name: ch.Name, Ready: ch.Err == nil, Detail: ch.Detail}
		if ch.Err != nil {
			ready = false
			one.Detail = notReadyDetail(ch.Err)
			s.log.DebugContext(ctx, "not ready", "check", ch.Name, "err", ch.Err)
		}
		checks = append(checks, one)
	}
	return checks, ready
}

// notReadyDetail shows what may be shown of an error.
func notReadyDetail(err error) string {
	p := toProblem(err)
	if p.Code == "internal" {
		return "does not answer; the log has more"
	}
	return p.Detail
}

func (s *Server) serveMetrics(c echo.Context) error {
	s.metrics.ServeHTTP(c.Response(), c.Request())
	return nil
}

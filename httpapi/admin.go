package httpapi

import (
	"net/http"

	"github.com/labstack/echo/v4"

	"github.com/lockstep-db/lockstep/internal/corpus"
)

const maxHistory = 100

func (s *Server) getConsistency(c echo.Context) error {
	if err := refuseUnknownQuery(c, "collection"); err != nil {
		return err
	}
	name, err := s.optionalCollection(c.QueryParam("collection"), "?collection")
	if err != nil {
		return err
	}
	reports, err := s.deps.Reconciler.Latest(c.Request().Context(), name)
	if err != nil {
		return err
	}
	for i := range reports {
		completeReport(&reports[i])
	}
	if reports == nil {
		reports = []corpus.CollectionReport{}
	}
	return writeJSON(c, http.StatusOK, struct {
		Collections []corpus.CollectionReport `json:"collections"`
	}{reports})
}

// optionalCollection is "" for all.
func (s *Server) optionalCollection(name, pointer string) (string, error) {
	if name == "" {
		return "", nil
	}
	return s.collection(name, pointer)
}

// completeReport makes every kind appear and lists be lists, whatever was recorded.
func completeReport(r *corpus.CollectionReport) {
	r.Findings = completeCounts(r.Findings)
	r.Repaired = completeCounts(r.Repaired)
	if r.Sample == nil {
		r.Sample = []corpus.Finding{}
	}
}

func completeCounts(c corpus.Counts) corpus.Counts {
	out := corpus.NewCounts()
	for k, n := range c {
		out[k] = n
	}
	return out
}

func completeRun(r *corpus.RunReport) {
	for i := range r.Collections {
		completeReport(&r.Collections[i])
	}
	if r.Collections == nil {
		r.Collections = []corpus.CollectionReport{}
	}
}

type reconcileJSON struct {
	Collection    string   `json:"collection"`
	Depth         string   `json:"depth"`
	Repair        bool     `json:"repair"`
	MaxDeletes    *float64 `json:"max_deletes"`
	Force         bool     `json:"force"`
	Resume        bool     `json:"resume"`
	DeleteForeign string   `json:"delete_foreign"`
}

// defaultMaxDeletes is the brake's share where a request names none.
const defaultMaxDeletes = 0.1

func (s *Server) reconcileRequest(in *reconcileJSON) (corpus.ReconcileRequest, error) {
	var bad []corpus.FieldError
	name, err := s.optionalCollection(in.Collection, "/collection")
	if err != nil {
		bad = append(bad, toProblem(err).Errors...)
	}
	depth := corpus.Depth(in.Depth)
	switch depth {
	case "":
		depth = corpus.Full
	case corpus.Quick, corpus.Full, corpus.Deep:
	default:
		bad = append(bad, corpus.FieldError{Pointer: "/depth", Code: "unknown_value", Detail: "depth is quick, full or deep"})
	}
	share := deref(in.MaxDeletes, defaultMaxDeletes)
	if share <= 0 || share > 1 {
		bad = append(bad, corpus.FieldError{Pointer: "/max_deletes", Code: "out_of_range", Detail: "max_deletes is a share above 0 and up to 1; a run without repair deletes nothing"})
	}
	if in.DeleteForeign != "" && !in.Repair {
		bad = append(bad, corpus.FieldError{Pointer: "/delete_foreign", Code: "not_applicable", Detail: "deleting needs repair"})
	}
	if in.DeleteForeign != "" && in.DeleteForeign != "none" {
		if _, ok := corpus.ParseID(in.DeleteForeign); !ok {
			bad = append(bad, corpus.FieldError{Pointer: "/delete_foreign", Code: "invalid_id", Detail: "name the foreign installation's UUID, or none for points without an owner"})
		}
	}
	if len(bad) > 0 {
		return corpus.ReconcileRequest{}, invalidFields(bad)
	}
	return corpus.ReconcileRequest{
		Collection: name, Depth: depth, Repair: in.Repair, MaxDeletes: share,
		Force: in.Force, Resume: in.Resume, DeleteForeign: in.DeleteForeign,
	}, nil
}

func (s *Server) startRun(c echo.Context) error {
	if err := refuseUnknownQuery(c); err != nil {
		return err
	}
	var in reconcileJSON
	if err := bind(c, &in); err != nil {
		return err
	}
	req, err := s.reconcileRequest(&in)
	if err != nil {
		return err
	}
	id, err := s.deps.Reconciler.Start(c.Request().Context(), req)
	if err != nil {
		return err
	}
	c.Response().Header().Set("Location", "/admin/reconcile/"+id.String())
	return writeJSON(c, http.StatusAccepted, struct {
		RunID corpus.ID `json:"run_id"`
	}{id})
}

func (s *Server) listRuns(c echo.Context) error {
	if err := refuseUnknownQuery(c, "collection", "limit"); err != nil {
		return err
	}
	name, err := s.optionalCollection(c.QueryParam("collection"), "?collection")
	if err != nil {
		return err
	}
	limit, err := queryInt(c, "limit", 20, 1, maxHistory)
	if err != nil {
		return err
	}
	runs, err := s.deps.Reconciler.History(c.Request().Context(), name, limit)
	if err != nil {
		return err
	}
	for i := range runs {
		completeRun(&runs[i])
	}
	if runs == nil {
		runs = []corpus.RunReport{}
	}
	return writeJSON(c, http.StatusOK, struct {
		Runs []corpus.RunReport `json:"runs"`
	}{runs})
}

// runID reads the id of the path. What is no UUID names no run.
func runID(c echo.Context) (corpus.ID, error) {
	id, ok := corpus.ParseID(c.Param("run_id"))
	if !ok {
		return id, refuse(http.StatusNotFound, "run_not_found", "there is no such run; a run's id is a UUID")
	}
	return id, nil
}

func (s *Server) getRun(c echo.Context) error {
	id, err := runID(c)
	if err != nil {
		return err
	}
	run, err := s.deps.Reconciler.Run(c.Request().Context(), id)
	if err != nil {
		return err
	}
	completeRun(&run)
	return writeJSON(c, http.StatusOK, &run)
}

func (s *Server) cancelRun(c echo.Context) error {
	id, err := runID(c)
	if err != nil {
		return err
	}
	if err := s.deps.Reconciler.Cancel(c.Request().Context(), id); err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s *Server) explain(c echo.Context) error {
	if err := refuseUnknownQuery(c, "id", "collection"); err != nil {
		return err
	}
	id := c.QueryParam("id")
	if code, detail := idFault(id); code != "" {
		return invalidQuery("id", "%s", detail)
	}
	name, err := s.optionalCollection(c.QueryParam("collection"), "?collection")
	if err != nil {
		return err
	}
	x, err := s.deps.Reconciler.Explain(c.Request().Context(), id, name)
	if err != nil {
		return err
	}
	return writeJSON(c, http.StatusOK, &x)
}

func (s *Server) resolveRollback(c echo.Context) error {
	if err := refuseUnknownQuery(c); err != nil {
		return err
	}
	var in struct {
		Collection string `json:"collection"`
		Decision   string `json:"decision"`
	}
	if err := bind(c, &in); err != nil {
		return err
	}
	// No default here: which collection is meant has to be said.
	if in.Collection == "" {
		return invalidField("/collection", "required", "name the collection")
	}
	name, err := s.collection(in.Collection, "/collection")
	if err != nil {
		return err
	}
	ctx := c.Request().Context()
	switch in.Decision {
	case "adopt":
		err = s.deps.Reconciler.AdoptRollback(ctx, name)
	case "discard":
		err = s.deps.Reconciler.DiscardRollback(ctx, name)
	default:
		return invalidField("/decision", "unknown_value", "the decision is adopt or discard")
	}
	if err != nil {
		return err
	}
	s.log.WarnContext(ctx, "rollback resolved", "request_id", c.Response().Header().Get(headerRequestID), "collection", name, "decision", in.Decision)
	return c.NoContent(http.StatusNoContent)
}

package httpapi

import (
	"net/http"

	"github.com/labstack/echo/v4"
)

func (s *Server) root(c echo.Context) error      { return c.Redirect(http.StatusSeeOther, "/docs") }
func (s *Server) docsPage(c echo.Context) error   { return nil }
func (s *Server) adminPage(c echo.Context) error  { return nil }
func (s *Server) adminAction(c echo.Context) error { return nil }
func (s *Server) writePageProblem(c echo.Context, p *problem) error {
	return c.String(p.Status, p.Detail)
}

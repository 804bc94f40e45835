package httpapi

import (
	_ "embed"
	"fmt"
	"net/http"

	"github.com/go-json-experiment/json"
	"github.com/labstack/echo/v4"
	"gopkg.in/yaml.v3"
)

//go:embed openapi.yaml
var openapiYAML []byte

// document is the contract, parsed once.
type document struct {
	tree map[string]any
	json []byte
}

// loadDocument reads the embedded contract and writes the version into it.
func loadDocument(version string) (*document, error) {
	d := &document{}
	if err := yaml.Unmarshal(openapiYAML, &d.tree); err != nil {
		return nil, err
	}
	info, ok := d.tree["info"].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("openapi.yaml has no info")
	}
	info["version"] = version
	body, err := json.Marshal(d.tree, json.Deterministic(true))
	if err != nil {
		return nil, err
	}
	d.json = body
	return d, nil
}

func (s *Server) serveOpenAPI(c echo.Context) error {
	return c.Blob(http.StatusOK, mediaJSON, s.openapi.json)
}

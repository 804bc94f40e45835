package config

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// setting is one leaf of [Config] with its names.
type setting struct {
	path string // http.max_body
	flag string // http-max-body
	env  []string
	help string
	// value is addressable.
	value reflect.Value
}

// settingsOf lists the leaves of c in order, by its struct tags: the one description from
// which flags, variables, the file and the printed form all follow.
func settingsOf(c *Config) []*setting {
	var out []*setting
	var walk func(v reflect.Value, prefix string)
	walk = func(v reflect.Value, prefix string) {
		t := v.Type()
		for i := range t.NumField() {
			f := t.Field(i)
			name := f.Tag.Get("yaml")
			if name == "" {
				continue
			}
			path := prefix + name
			if f.Type.Kind() == reflect.Struct {
				walk(v.Field(i), path+".")
				continue
			}
			flat := strings.ReplaceAll(path, ".", "_")
			s := &setting{
				path: path, flag: strings.ReplaceAll(flat, "_", "-"), help: f.Tag.Get("help"), value: v.Field(i),
				env: []string{"LOCKSTEP_" + strings.ToUpper(flat)},
			}
			if other := f.Tag.Get("env"); other != "" {
				// The service's own name wins over the one it shares with other programs.
				s.env = append(s.env, other)
			}
			out = append(out, s)
		}
	}
	walk(reflect.ValueOf(c).Elem(), "")
	return out
}

// set parses text into the field. Errors say what is accepted and never repeat a secret.
func (s *setting) set(text string) error {
	switch p := s.value.Addr().Interface().(type) {
	case *string:
		*p = text
	case *Secret:
		*p = Secret(text)
	case *bool:
		switch strings.ToLower(text) {
		case "true", "on", "yes", "1":
			*p = true
		case "false", "off", "no", "0":
			*p = false
		default:
			return fmt.Errorf("%q is neither on nor off", text)
		}
	case *int:
		n, err := strconv.Atoi(strings.ReplaceAll(text, "_", ""))
		if err != nil {
			return fmt.Errorf("%q is not an integer", text)
		}
		*p = n
	case *float64:
		n, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return fmt.Errorf("%q is not a number", text)
		}
		*p = n
	case *time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fmt.Errorf("%q is not a duration such as 500ms, 30s or 5m", text)
		}
		*p = d
	case *Bytes:
		n, err := parseBytes(text)
		if err != nil {
			return err
		}
		*p = n
	case *APIKeys:
		ks, err := parseAPIKeys(text, false)
		if err != nil {
			return err
		}
		*p = ks
	default:
		panic("config: setting " + s.path + " has a type that nothing parses: " + s.value.Type().String())
	}
	return nil
}

// text renders the field for people, secrets masked.
func (s *setting) text() string {
	switch v := s.value.Interface().(type) {
	case Secret:
		if s.path == "database_url" {
			return maskURL(string(v))
		}
		return v.String()
	case bool:
		if v {
			return "on"
		}
		return "off"
	case string:
		return v
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64)
	default:
		return fmt.Sprint(v)
	}
}

func (s *setting) isText() bool {
	switch s.value.Interface().(type) {
	case string, Secret, APIKeys:
		return true
	}
	return false
}

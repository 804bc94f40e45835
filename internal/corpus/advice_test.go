package corpus

import "testing"

func TestEveryFindingHasAdvice(t *testing.T) {
	t.Parallel()
	for _, k := range FindingKinds {
		if a := k.Advice(); a.Meaning == "" || a.Cause == "" || a.Repair == "" {
			t.Errorf("%s lacks advice: %+v", k, a)
		}
	}
	if len(advice) != len(FindingKinds) {
		t.Errorf("%d kinds, advice for %d", len(FindingKinds), len(advice))
	}
}

func TestParseIDInvertsString(t *testing.T) {
	t.Parallel()
	id := ID{0xde, 0xad, 15: 7}
	got, ok := ParseID(id.String())
	if !ok || got != id {
		t.Errorf("ParseID(%q) = %v, %v", id.String(), got, ok)
	}
	for _, bad := range []string{"", "dead", id.String() + "0", "deadgeef-0000-0000-0000-000000000007", "dead00000-000-0000-0000-000000000007", "-----------------------------------0"} {
		if _, ok := ParseID(bad); ok {
			t.Errorf("ParseID(%q) accepted", bad)
		}
	}
}

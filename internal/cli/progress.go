package cli

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// progress draws one line on a terminal, again and again. On anything else it draws nothing.
type progress struct {
	w     io.Writer
	on    bool
	now   func() time.Time
	begin time.Time

	mu    sync.Mutex
	last  time.Time
	drawn int
}

// redraw is how often the line changes: often enough to be alive, seldom enough to be cheap.
const redraw = 150 * time.Millisecond

func (e *Env) progress(off bool) *progress {
	return &progress{w: e.Stderr, on: !off && IsTerminal(e.Stderr), now: e.now, begin: e.now()}
}

// show draws done of total (0 if unknown) in units of its own, with what stands beside it.
func (p *progress) show(done, total float64, beside string) {
	if !p.on {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	if now.Sub(p.last) < redraw {
		return
	}
	p.last = now
	p.draw(bar(done, total, now.Sub(p.begin)) + beside)
}

func (p *progress) draw(line string) {
	pad := max(0, p.drawn-len(line))
	fmt.Fprintf(p.w, "\r%s%s", line, strings.Repeat(" ", pad))
	p.drawn = len(line)
}

// clear removes the line, so that ordinary output follows on an empty one.
func (p *progress) clear() {
	if !p.on {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drawn > 0 {
		p.draw("")
		fmt.Fprint(p.w, "\r")
		p.drawn = 0
	}
	p.last = time.Time{}
}

// bar renders share and time left.
func bar(done, total float64, took time.Duration) string {
	if total <= 0 {
		return ""
	}
	share := min(1, done/total)
	const cells = 24
	full := int(share * cells)
	s := fmt.Sprintf("[%s%s] %3.0f%%", strings.Repeat("=", full), strings.Repeat(" ", cells-full), 100*share)
	if share > 0.005 && share < 1 && took > time.Second {
		left := time.Duration(float64(took) * (1 - share) / share)
		s += " " + short(left) + " left"
	}
	return s + "  "
}

// short renders a duration for people.
func short(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	default:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
}

// count renders a number with separators.
func count(n int64) string {
	s := fmt.Sprint(n)
	neg := strings.HasPrefix(s, "-")
	s = strings.TrimPrefix(s, "-")
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	if neg {
		return "-" + s
	}
	return s
}

// plural renders "1 document" or "2 documents".
func plural(n int64, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return count(n) + " " + word + "s"
}

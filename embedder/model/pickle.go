package model

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// This file reads the pickles that torch.save writes for a dictionary of tensors, and
// nothing else. Pickle is a program for a small stack machine that can call any Python
// function; here the only callables are the few below, which build plain values. Every
// other one, and every instruction that torch.save has no need of, is refused.

// The values on the machine's stack are string, int64, bool, nil (None), float64, tuple,
// *list, *dict, global, storageRef and tensorRef.
type (
	tuple  []any
	list   struct{ items []any }
	dict   struct{ items map[string]any }
	global string
	// mark separates the arguments of the instructions that take many.
	mark struct{}
)

// storageRef is a block of numbers that lies in a file of its own in the archive.
type storageRef struct {
	dtype dtype
	key   string
	count int64
}

// tensorRef is a view of a storage.
type tensorRef struct {
	storage storageRef
	offset  int64
	shape   []int
}

const (
	orderedDict      global = "collections OrderedDict"
	rebuildTensor    global = "torch._utils _rebuild_tensor_v2"
	rebuildParameter global = "torch._utils _rebuild_parameter"
)

// storageTypes are the classes that a storage may claim.
var storageTypes = map[global]dtype{
	"torch DoubleStorage":   f64,
	"torch FloatStorage":    f32,
	"torch HalfStorage":     f16,
	"torch BFloat16Storage": bf16,
	"torch LongStorage":     "I64",
	"torch IntStorage":      "I32",
	"torch ShortStorage":    "I16",
	"torch CharStorage":     "I8",
	"torch ByteStorage":     "U8",
	"torch BoolStorage":     "BOOL",
}

// maxPickle bounds the pickle, not the tensors it describes: a model of 10,000 tensors has 2 MB.
const maxPickle = 64 << 20

// maxRank bounds a tensor's dimensions, as torch does.
const maxRank = 64

var errPickle = errors.New("not a pickle of tensors")

func pickleError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errPickle, fmt.Sprintf(format, args...))
}

// unpickler is the machine. Its memory is bounded by the length of its program: each
// instruction adds at most what it occupies in the program.
type unpickler struct {
	in    []byte
	stack []any
	memo  map[uint32]any
}

// unpickleTensors runs a pickle and returns the tensors of the dictionary it builds.
func unpickleTensors(program []byte) (map[string]tensorRef, error) {
	u := &unpickler{in: program, memo: map[uint32]any{}}
	v, err := u.run()
	if err != nil {
		return nil, err
	}
	d, ok := v.(*dict)
	if !ok {
		return nil, pickleError("it does not hold a dictionary")
	}
	out := make(map[string]tensorRef, len(d.items))
	for name, item := range d.items {
		t, ok := item.(tensorRef)
		if !ok {
			return nil, pickleError("entry %q is not a tensor", name)
		}
		out[name] = t
	}
	return out, nil
}

func (u *unpickler) take(n int) ([]byte, error) {
	if n < 0 || n > len(u.in) {
		return nil, pickleError("it ends too early")
	}
	b := u.in[:n]
	u.in = u.in[n:]
	return b, nil
}

func (u *unpickler) uint(n int) (uint32, error) {
	b, err := u.take(n)
	if err != nil {
		return 0, err
	}
	var v uint32
	for i, x := range b {
		v |= uint32(x) << (8 * i)
	}
	return v, nil
}

func (u *unpickler) line() (string, error) {
	for i, c := range u.in {
		if c == '\n' {
			s := string(u.in[:i])
			u.in = u.in[i+1:]
			return s, nil
		}
	}
	return "", pickleError("it ends too early")
}

func (u *unpickler) push(v any) { u.stack = append(u.stack, v) }

// pop takes the top, which must not be a mark.
func (u *unpickler) pop() (any, error) {
	if len(u.stack) == 0 {
		return nil, pickleError("its stack is empty")
	}
	v := u.stack[len(u.stack)-1]
	if _, isMark := v.(mark); isMark {
		return nil, pickleError("a value is missing")
	}
	u.stack = u.stack[:len(u.stack)-1]
	return v, nil
}

// popMark takes everything above the last mark, and the mark.
func (u *unpickler) popMark() ([]any, error) {
	for i := len(u.stack) - 1; i >= 0; i-- {
		if _, isMark := u.stack[i].(mark); isMark {
			items := append([]any(nil), u.stack[i+1:]...)
			u.stack = u.stack[:i]
			return items, nil
		}
	}
	return nil, pickleError("a mark is missing")
}

func (u *unpickler) popTuple(n int) error {
	t := make(tuple, n)
	for i := n - 1; i >= 0; i-- {
		v, err := u.pop()
		if err != nil {
			return err
		}
		t[i] = v
	}
	u.push(t)
	return nil
}

// top is the container that an instruction adds to.
func (u *unpickler) top() any {
	if len(u.stack) == 0 {
		return nil
	}
	return u.stack[len(u.stack)-1]
}

func (u *unpickler) run() (any, error) {
	for {
		op, err := u.take(1)
		if err != nil {
			return nil, err
		}
		if op[0] == '.' { // STOP
			v, err := u.pop()
			if err == nil && len(u.stack) != 0 {
				err = pickleError("values are left over")
			}
			return v, err
		}
		if err := u.step(op[0]); err != nil {
			return nil, err
		}
	}
}

// step carries out one instruction.
func (u *unpickler) step(op byte) error {
	switch op {
	case 0x80: // PROTO
		v, err := u.uint(1)
		if err == nil && (v < 2 || v > 5) {
			err = pickleError("protocol %d is unknown", v)
		}
		return err
	case 0x95: // FRAME: only a hint
		_, err := u.take(8)
		return err
	case '(':
		u.push(mark{})
	case 'N':
		u.push(nil)
	case 0x88:
		u.push(true)
	case 0x89:
		u.push(false)
	case '}':
		u.push(&dict{items: map[string]any{}})
	case ']':
		u.push(&list{})
	case ')':
		u.push(tuple{})
	case 'K', 'M', 'J': // BININT1, BININT2, BININT
		v, err := u.uint(map[byte]int{'K': 1, 'M': 2, 'J': 4}[op])
		if err != nil {
			return err
		}
		if op == 'J' {
			u.push(int64(int32(v)))
		} else {
			u.push(int64(v))
		}
	case 0x8a: // LONG1
		return u.long()
	case 'G': // BINFLOAT
		b, err := u.take(8)
		if err != nil {
			return err
		}
		u.push(math.Float64frombits(binary.BigEndian.Uint64(b)))
	case 'X', 0x8c: // BINUNICODE, SHORT_BINUNICODE
		n, err := u.uint(map[byte]int{'X': 4, 0x8c: 1}[op])
		if err != nil {
			return err
		}
		b, err := u.take(int(n))
		if err != nil {
			return err
		}
		u.push(string(b))
	case 0x85, 0x86, 0x87: // TUPLE1 to TUPLE3
		return u.popTuple(int(op-0x85) + 1)
	case 't': // TUPLE
		items, err := u.popMark()
		if err != nil {
			return err
		}
		u.push(tuple(items))
	case 'q', 'r', 0x94: // BINPUT, LONG_BINPUT, MEMOIZE
		at := uint32(len(u.memo))
		if op != 0x94 {
			var err error
			if at, err = u.uint(map[byte]int{'q': 1, 'r': 4}[op]); err != nil {
				return err
			}
		}
		v, err := u.pop()
		if err != nil {
			return err
		}
		u.memo[at] = v
		u.push(v)
	case 'h', 'j': // BINGET, LONG_BINGET
		at, err := u.uint(map[byte]int{'h': 1, 'j': 4}[op])
		if err != nil {
			return err
		}
		v, ok := u.memo[at]
		if !ok {
			return pickleError("it refers to a value that is not there")
		}
		u.push(v)
	case 'a', 'e', 's', 'u': // APPEND, APPENDS, SETITEM, SETITEMS
		return u.fill(op)
	case 'c': // GLOBAL
		module, err := u.line()
		if err != nil {
			return err
		}
		name, err := u.line()
		if err != nil {
			return err
		}
		return u.pushGlobal(module, name)
	case 0x93: // STACK_GLOBAL
		if err := u.popTuple(2); err != nil {
			return err
		}
		v, _ := u.pop()
		module, ok1 := v.(tuple)[0].(string)
		name, ok2 := v.(tuple)[1].(string)
		if !ok1 || !ok2 {
			return pickleError("a name is not text")
		}
		return u.pushGlobal(module, name)
	case 'R': // REDUCE
		return u.call()
	case 'Q': // BINPERSID
		return u.storage()
	case 'b': // BUILD: the state of a dictionary, which holds module versions
		state, err := u.pop()
		if err != nil {
			return err
		}
		_, ok1 := state.(*dict)
		_, ok2 := u.top().(*dict)
		if !ok1 || !ok2 {
			return pickleError("it sets the state of something other than a dictionary")
		}
	default:
		return pickleError("instruction %#02x is not used by torch.save", op)
	}
	return nil
}

// long reads an integer of up to eight bytes.
func (u *unpickler) long() error {
	n, err := u.uint(1)
	if err != nil {
		return err
	}
	b, err := u.take(int(n))
	if err != nil {
		return err
	}
	if len(b) > 8 {
		return pickleError("an integer is too long")
	}
	var v uint64
	for i, x := range b {
		v |= uint64(x) << (8 * i)
	}
	if n := len(b); n > 0 && n < 8 && b[n-1]&0x80 != 0 {
		v |= ^uint64(0) << (8 * n)
	}
	u.push(int64(v))
	return nil
}

// fill adds to a list or a dictionary.
func (u *unpickler) fill(op byte) error {
	var items []any
	var err error
	switch op {
	case 'e', 'u':
		items, err = u.popMark()
	default:
		n := map[byte]int{'a': 1, 's': 2}[op]
		if err = u.popTuple(n); err == nil {
			var v any
			v, err = u.pop()
			if err == nil {
				items = v.(tuple)
			}
		}
	}
	if err != nil {
		return err
	}
	switch c := u.top().(type) {
	case *list:
		if op == 's' || op == 'u' {
			return pickleError("it sets an entry of a list")
		}
		c.items = append(c.items, items...)
	case *dict:
		if op == 'a' || op == 'e' || len(items)%2 != 0 {
			return pickleError("it appends to a dictionary")
		}
		for i := 0; i < len(items); i += 2 {
			key, ok := items[i].(string)
			if !ok {
				return pickleError("a dictionary's key is not text")
			}
			c.items[key] = items[i+1]
		}
	default:
		return pickleError("it adds to something other than a list or a dictionary")
	}
	return nil
}

// pushGlobal admits the names that tensors need.
func (u *unpickler) pushGlobal(module, name string) error {
	g := global(module + " " + name)
	_, isStorage := storageTypes[g]
	if !isStorage && g != orderedDict && g != rebuildTensor && g != rebuildParameter {
		return pickleError("it asks for %.60q of %.60q, which tensors have no need of; nothing was executed", name, module)
	}
	u.push(g)
	return nil
}

// call carries out the few calls that build values.
func (u *unpickler) call() error {
	a, err := u.pop()
	if err != nil {
		return err
	}
	f, err := u.pop()
	if err != nil {
		return err
	}
	args, ok := a.(tuple)
	if !ok {
		return pickleError("a call has no arguments")
	}
	switch {
	case f == any(orderedDict) && len(args) == 0:
		u.push(&dict{items: map[string]any{}})
	case f == any(rebuildTensor) && (len(args) == 6 || len(args) == 7):
		t, err := rebuild(args)
		if err != nil {
			return err
		}
		u.push(t)
	case f == any(rebuildParameter) && len(args) == 3:
		t, ok := args[0].(tensorRef)
		if !ok {
			return pickleError("a parameter is not a tensor")
		}
		u.push(t)
	default:
		return pickleError("a call does not have the form that torch.save writes")
	}
	return nil
}

// storage turns a persistent id into a reference to a storage.
func (u *unpickler) storage() error {
	v, err := u.pop()
	if err != nil {
		return err
	}
	id, _ := v.(tuple)
	if len(id) != 5 || id[0] != any("storage") {
		return pickleError("a reference does not name a storage")
	}
	class, ok1 := id[1].(global)
	key, ok2 := id[2].(string)
	count, ok3 := id[4].(int64)
	kind, ok4 := storageTypes[class]
	if !ok1 || !ok2 || !ok3 || !ok4 || count < 0 {
		return pickleError("a reference to a storage is damaged")
	}
	u.push(storageRef{dtype: kind, key: key, count: count})
	return nil
}

// rebuild makes a tensor from a storage, an offset, a shape and strides. Only row-major
// tensors are taken, which is what checkpoints hold.
func rebuild(args tuple) (tensorRef, error) {
	storage, ok1 := args[0].(storageRef)
	offset, ok2 := args[1].(int64)
	size, ok3 := args[2].(tuple)
	stride, ok4 := args[3].(tuple)
	if !ok1 || !ok2 || !ok3 || !ok4 || offset < 0 || len(size) != len(stride) || len(size) > maxRank {
		return tensorRef{}, pickleError("a tensor is damaged")
	}
	shape := make([]int, len(size))
	for i := range size {
		n, ok := size[i].(int64)
		if !ok || n < 0 || n > math.MaxInt32 {
			return tensorRef{}, pickleError("a tensor's shape is damaged")
		}
		shape[i] = int(n)
	}
	total, ok := elementCount(shape)
	if !ok || offset > storage.count || int64(total) > storage.count-offset {
		return tensorRef{}, pickleError("a tensor reaches beyond its storage")
	}
	want := int64(1)
	for i := len(shape) - 1; i >= 0; i-- {
		if s, ok := stride[i].(int64); !ok || (s != want && shape[i] > 1 && total > 0) {
			return tensorRef{}, pickleError("a tensor is not stored row by row; save it with .contiguous()")
		}
		want *= int64(max(shape[i], 1))
	}
	return tensorRef{storage: storage, offset: offset, shape: shape}, nil
}

package qdrantlocal

import (
	"github.com/qdrant/go-client/qdrant"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// checkUnknown refuses a request that holds fields this version does not know, at any
// depth. Protobuf would drop them in silence, and with them a filter or a mode that a newer
// client relies on. Payload values and plain vectors, the bulk of a request, are skipped.
func checkUnknown(req any) error {
	m, ok := req.(proto.Message)
	if !ok {
		return nil
	}
	if at := findUnknown(m.ProtoReflect()); at != "" {
		return unimplemented("a field of " + string(at) + " that is newer than API version " + Version)
	}
	return nil
}

func findUnknown(m protoreflect.Message) protoreflect.FullName {
	// Types that carry a request's bulk, and cannot carry meaning beyond it.
	switch x := m.Interface().(type) {
	case *qdrant.Value, *qdrant.DenseVector, *qdrant.SparseVector, *qdrant.MultiDenseVector:
		return ""
	case *qdrant.PointId:
		if len(m.GetUnknown()) == 0 {
			return ""
		}
	case *qdrant.PointStruct:
		// Spelled out, because reflection over the payloads of a large batch costs more
		// than the write itself.
		if len(m.GetUnknown()) > 0 {
			return m.Descriptor().FullName()
		}
		if x.GetVectors() == nil {
			return ""
		}
		return findUnknown(x.GetVectors().ProtoReflect())
	}
	if len(m.GetUnknown()) > 0 {
		return m.Descriptor().FullName()
	}
	var found protoreflect.FullName
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			if fd.MapValue().Message() == nil {
				return true
			}
			v.Map().Range(func(_ protoreflect.MapKey, e protoreflect.Value) bool {
				found = findUnknown(e.Message())
				return found == ""
			})
		case fd.Message() == nil:
		case fd.IsList():
			l := v.List()
			for i := 0; i < l.Len() && found == ""; i++ {
				found = findUnknown(l.Get(i).Message())
			}
		default:
			found = findUnknown(v.Message())
		}
		return found == ""
	})
	return found
}

package model

import (
	"archive/zip"
	"fmt"
	"io"
	"slices"
	"strings"
)

// maxArchiveEntries bounds a PyTorch archive: a storage each for every tensor and a few more.
const maxArchiveEntries = 1 << 18

// readTorch lists the tensors of a file that torch.save wrote (the zip format, since
// PyTorch 1.6). It reads the archive's directory and the pickle; tensors stay on disk
// behind r. Entries must be stored, not compressed, as torch stores them, so that nothing
// unpacks to more than the file holds; no entry's name is ever used as a path.
func readTorch(file string, r io.ReaderAt, size int64) ([]*tensor, error) {
	zr, err := zip.NewReader(r, size)
	if err != nil {
		return nil, damaged(file, "is not a PyTorch checkpoint in zip format (if PyTorch before 1.6 wrote it, load and save it again, as safetensors if possible)", err)
	}
	if len(zr.File) > maxArchiveEntries {
		return nil, damaged(file, fmt.Sprintf("has %d entries, more than any checkpoint", len(zr.File)), nil)
	}
	entries := make(map[string]*zip.File, len(zr.File))
	root := ""
	for _, f := range zr.File {
		if _, ok := entries[f.Name]; ok {
			return nil, damaged(file, fmt.Sprintf("has two entries named %.100q", f.Name), nil)
		}
		entries[f.Name] = f
		if dir, ok := strings.CutSuffix(f.Name, "data.pkl"); ok && strings.Count(dir, "/") == 1 {
			if root != "" {
				return nil, damaged(file, "has two pickles", nil)
			}
			root = dir
		}
	}
	if root == "" {
		return nil, damaged(file, "has no pickle of tensors (data.pkl)", nil)
	}
	if f := entries[root+"byteorder"]; f != nil {
		order, err := readEntry(file, f, 16)
		if err != nil {
			return nil, err
		}
		if string(order) != "little" {
			return nil, unsupported("%s was written on a big-endian machine; convert it to safetensors", file)
		}
	}
	program, err := readEntry(file, entries[root+"data.pkl"], maxPickle)
	if err != nil {
		return nil, err
	}
	refs, err := unpickleTensors(program)
	if err != nil {
		return nil, damaged(file, "cannot be read", err)
	}
	list := make([]*tensor, 0, len(refs))
	for name, ref := range refs {
		f := entries[root+"data/"+ref.storage.key]
		width := dtypeSize[ref.storage.dtype]
		if f == nil {
			return nil, damaged(file, fmt.Sprintf("has no data for %.100q", name), nil)
		}
		if err := checkStored(file, f); err != nil {
			return nil, err
		}
		if ref.storage.count > int64(f.UncompressedSize64)/width || uint64(ref.storage.count*width) != f.UncompressedSize64 {
			return nil, damaged(file, fmt.Sprintf("has data of the wrong size for %.100q", name), nil)
		}
		start, err := f.DataOffset()
		if err != nil {
			return nil, damaged(file, fmt.Sprintf("has no data for %.100q", name), err)
		}
		if start < 0 || start > size || int64(f.UncompressedSize64) > size-start {
			return nil, damaged(file, fmt.Sprintf("ends inside the data of %.100q", name), nil)
		}
		t := &tensor{
			name: name, dtype: ref.storage.dtype, shape: ref.shape,
			src: r, off: start + ref.offset*width, file: file,
		}
		// Zero means that no checksum was taken, to archive/zip and here.
		if ref.offset == 0 && int64(t.elements()) == ref.storage.count && f.CRC32 != 0 {
			t.crc = &f.CRC32
		}
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b *tensor) int { return strings.Compare(a.name, b.name) })
	return list, nil
}

// checkStored refuses compressed and encrypted entries.
func checkStored(file string, f *zip.File) error {
	if f.Method != zip.Store || f.CompressedSize64 != f.UncompressedSize64 || f.Flags&1 != 0 {
		return damaged(file, fmt.Sprintf("has the entry %.100q compressed or encrypted; torch.save stores entries as they are", f.Name), nil)
	}
	return nil
}

// readEntry reads one small entry whole and checks its checksum.
func readEntry(file string, f *zip.File, most int64) ([]byte, error) {
	if err := checkStored(file, f); err != nil {
		return nil, err
	}
	if f.UncompressedSize64 > uint64(most) {
		return nil, damaged(file, fmt.Sprintf("has the entry %.100q of %d bytes; at most %d are expected", f.Name, f.UncompressedSize64, most), nil)
	}
	rc, err := f.Open()
	if err != nil {
		return nil, damaged(file, "is damaged", err)
	}
	defer rc.Close()
	data, err := io.ReadAll(io.LimitReader(rc, most+1))
	if err != nil {
		return nil, damaged(file, fmt.Sprintf("has the entry %.100q damaged", f.Name), err)
	}
	return data, nil
}

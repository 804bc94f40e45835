package reconcile

// Finished waits until no goroutine of the service works on a run.
func (s *Service) Finished() { s.wg.Wait() }

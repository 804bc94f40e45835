package postgres

// The statements whose plans a test looks at.
const (
	WalkIDsSQL      = walkIDs
	WalkAllSQL      = walkAll
	WalkPlanSQL     = walkPlan
	BucketCountsSQL = bucketCounts
)

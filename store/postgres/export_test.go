package postgres

// JoinSQL and JoinContextSQL let a test look at their plans.
var (
	JoinSQL        = joinSQL
	JoinContextSQL = joinContextSQL
)

#!/usr/bin/env bash
# Where the fleet runs: the private subnets of the base machine's VPC.

# choose_subnets: the fleet's subnets and their zones, comma-separated; which they are, in words; and of private ones
# the route tables.
SUBNETS="" ZONES="" SUBNETS_ARE="" ROUTE_TABLES=""

# A subnet is private when its route table, which is the VPC's main one where it has none of its own, has no route to an
# internet gateway.
choose_subnets() {
  local answer tables gateway table members subnet zone
  local -A gateway_of=() table_of=() zones=() used=()
  local -a all=() private=()
  answer=$(ask "list the subnets of $VPC" aws ec2 describe-subnets \
    --filters "Name=vpc-id,Values=$VPC" Name=state,Values=available \
    --query 'sort_by(Subnets, &SubnetId)[].[SubnetId, AvailabilityZone]' --output text)
  # One line for each table: the internet gateway or None, the table, then the subnets that use it.
  tables=$(ask "list the route tables of $VPC" aws ec2 describe-route-tables \
    --filters "Name=vpc-id,Values=$VPC" \
    --query "RouteTables[].[Routes[?starts_with(not_null(GatewayId, ''), 'igw-')].GatewayId | [0], RouteTableId,
      join(' ', Associations[?SubnetId || Main].not_null(SubnetId, 'main'))]" \
    --output text)
  while IFS=$'\t' read -r gateway table members; do
    for subnet in $members; do
      gateway_of[$subnet]=$gateway table_of[$subnet]=$table
    done
  done <<<"$tables"
  while read -r subnet zone; do
    [[ -n $subnet ]] || continue
    all+=("$subnet") zones[$zone]=yes
    [[ ${gateway_of[$subnet]:-${gateway_of[main]:-None}} != igw-* ]] || continue
    private+=("$subnet") used[${table_of[$subnet]:-${table_of[main]}}]=yes
  done <<<"$answer"
  ((${#all[@]})) || problem "the base machine's VPC $VPC has no subnet that is available: make one for the fleet"
  ROUTE_TABLES="${!used[*]}"
  SUBNETS_ARE=private
  if ((${#private[@]} == 0)); then
    SUBNETS_ARE="no subnet is private, so all are used"
    private=("${all[@]}")
  fi
  SUBNETS=$(listed "${private[@]}")
  ZONES=$(printf '%s\n' "${!zones[@]}" | sort | paste -s -d ,)
}

# check_endpoint: the way to S3 that costs nothing. From a public subnet it is free without.
check_endpoint() {
  local answer table
  local -a without=()
  answer=$(try "look at the endpoints of $VPC" aws ec2 describe-vpc-endpoints \
    --filters "Name=vpc-id,Values=$VPC" Name=vpc-endpoint-type,Values=Gateway \
    --query "VpcEndpoints[?ends_with(ServiceName, '.s3') && (State=='available' || State=='Available')].RouteTableIds[]" --output text) || return 0
  for table in $ROUTE_TABLES; do
    [[ $answer == *"$table"* ]] || without+=("$table")
  done
  ((${#without[@]} == 0)) \
    || warn "the fleet's subnets have no gateway endpoint for S3, so every model is paid for at the NAT gateway: aws ec2 create-vpc-endpoint --region $REGION --vpc-id $VPC --service-name com.amazonaws.$REGION.s3 --route-table-ids ${without[*]}"
}

#!/usr/bin/env bash
# Where the fleet runs: subnets of the base machine's VPC, from which an instance reaches AWS.

# What look_at_network finds in VPC. Of each subnet: its zone, whether it gives out public addresses, its route table.
# Of each table: a route to an internet gateway, and where the IPv4 default route leads; None where there is none. And
# the endpoints: a line each, with a blank before each table that a gateway endpoint is in.
ALL_SUBNETS=() ENDPOINTS=""
declare -A ZONE_OF=() GIVES_ADDRESS=() TABLE_OF=() INTERNET_OF=() WAY_OF=()

# choose_subnets: the fleet's subnets and their zones, comma-separated; which they are, in words; and of private ones
# the route tables.
SUBNETS="" ZONES="" SUBNETS_ARE="" ROUTE_TABLES=""
SUBNETS_MARK="" # choose_subnets: the group's tag comfy-subnets: `named` while its subnets are those of --subnets

# choose_subnets [ASKED]: ASKED is --subnets, a list, `auto` or empty. Whoever names them knows better, and they stay
# until others are named, or `auto`. Else they are the private ones, whose route table, which is the VPC's main one where
# they have none of their own, has no route to an internet gateway; where none is private, the public ones. All of them
# need a way to AWS, or their instances would boot, take no job and never leave.
choose_subnets() {
  local asked=${1:-} subnet kind
  local -a private=() public=() lost=()
  look_at_network
  choose_named "$asked"
  [[ -z $SUBNETS_ARE ]] || return 0
  for subnet in "${ALL_SUBNETS[@]}"; do
    kind=private
    [[ ${INTERNET_OF[${TABLE_OF[$subnet]}]} == None ]] || kind=public
    if has_way "$subnet"; then
      if [[ $kind == private ]]; then private+=("$subnet"); else public+=("$subnet"); fi
    elif [[ $kind == private ]]; then
      lost+=("$subnet")
    fi
  done
  if ((${#private[@]})); then
    SUBNETS_ARE=private
    ((${#lost[@]} == 0)) || SUBNETS_ARE+="; no way to AWS from ${lost[*]}"
    use_subnets "${private[@]}"
    ROUTE_TABLES=$(for subnet in "${private[@]}"; do printf '%s\n' "${TABLE_OF[$subnet]}"; done | sort -u | paste -s -d ' ')
  elif ((${#lost[@]})); then
    problem "the private subnets ${lost[*]} have no way to AWS, so no instance could take a job: $(remedy "${lost[0]}"), or name other subnets with --subnets"
  elif ((${#public[@]})); then
    SUBNETS_ARE="no subnet is private, so all that give out public addresses are used"
    use_subnets "${public[@]}"
  elif ((${#ALL_SUBNETS[@]})); then
    problem "no subnet of $VPC is private, and ${ALL_SUBNETS[*]} give out no public addresses, so no instance could take a job: aws ec2 modify-subnet-attribute --region $REGION --map-public-ip-on-launch --subnet-id ${ALL_SUBNETS[0]}, or name subnets with --subnets"
  else
    problem "the base machine's VPC $VPC has no subnet that is available: make one for the fleet"
  fi
}

# use_subnets SUBNET...
use_subnets() {
  local subnet
  SUBNETS=$(listed "$@")
  ZONES=$(for subnet in "$@"; do printf '%s\n' "${ZONE_OF[$subnet]}"; done | sort -u | paste -s -d ,)
}

# choose_named ASKED: those of --subnets, of this run or of an earlier one; then SUBNETS_ARE says so.
choose_named() {
  local asked=$1 answer subnet
  local -a named=() lost=()
  SUBNETS="" ZONES="" SUBNETS_ARE="" ROUTE_TABLES=""
  answer=$(ask "look at the group $ASG_NAME" aws autoscaling describe-auto-scaling-groups \
    --auto-scaling-group-names "$ASG_NAME" \
    --query "AutoScalingGroups[0].[Tags[?Key=='comfy-subnets'].Value | [0], VPCZoneIdentifier]" --output text)
  read -r SUBNETS_MARK answer <<<"$answer"
  if [[ -z $asked && $SUBNETS_MARK == named ]]; then asked=$answer; fi
  [[ -n $asked && $asked != auto ]] || return 0
  IFS=, read -r -a named <<<"$asked"
  for subnet in "${named[@]}"; do
    if [[ ! -v ZONE_OF[$subnet] ]]; then
      problem "--subnets has $subnet, which is no subnet of $VPC, the base machine's VPC, that is available and has IPv4"
    elif ! has_way "$subnet"; then
      lost+=("$subnet")
    fi
  done
  ((${#PROBLEMS[@]})) || use_subnets "${named[@]}"
  ((${#lost[@]} == 0)) || warn "the subnets ${lost[*]} have no way to AWS that can be seen here: $(remedy "${lost[0]}")"
  SUBNETS_ARE="named with --subnets"
}

# look_at_network: what leads nowhere is left out: a route whose target is gone (a black hole), a subnet with IPv6 only.
look_at_network() {
  local answer subnet zone gives internet way table members main=none
  ALL_SUBNETS=() ZONE_OF=() GIVES_ADDRESS=() TABLE_OF=() INTERNET_OF=([none]=None) WAY_OF=([none]=None)
  # One line for each table: a route to an internet gateway, where the default route leads, the table, and the subnets
  # that use it. AWS lets no traffic through a peered VPC; behind the other targets it is expected to find its way.
  answer=$(ask "list the route tables of $VPC" aws ec2 describe-route-tables \
    --filters "Name=vpc-id,Values=$VPC" \
    --query "RouteTables[].[Routes[?starts_with(not_null(GatewayId, ''), 'igw-')].GatewayId | [0],
      Routes[?DestinationCidrBlock=='0.0.0.0/0' && State=='active' && !VpcPeeringConnectionId].not_null(GatewayId,
        NatGatewayId, TransitGatewayId, NetworkInterfaceId, InstanceId, CoreNetworkArn, LocalGatewayId,
        CarrierGatewayId) | [0],
      RouteTableId, join(' ', Associations[?SubnetId || Main].not_null(SubnetId, 'main'))]" \
    --output text)
  while IFS=$'\t' read -r internet way table members; do
    [[ -n $table ]] || continue
    INTERNET_OF[$table]=$internet WAY_OF[$table]=$way
    for subnet in $members; do
      if [[ $subnet == main ]]; then main=$table; else TABLE_OF[$subnet]=$table; fi
    done
  done <<<"$answer"
  answer=$(ask "list the subnets of $VPC" aws ec2 describe-subnets \
    --filters "Name=vpc-id,Values=$VPC" Name=state,Values=available \
    --query 'sort_by(Subnets, &SubnetId)[?!Ipv6Native].[SubnetId, AvailabilityZone, MapPublicIpOnLaunch]' --output text)
  while read -r subnet zone gives; do
    [[ -n $subnet ]] || continue
    ALL_SUBNETS+=("$subnet") ZONE_OF[$subnet]=$zone GIVES_ADDRESS[$subnet]=$gives
    TABLE_OF[$subnet]=${TABLE_OF[$subnet]:-$main}
  done <<<"$answer"
  ENDPOINTS=$(try "look at the endpoints of $VPC" aws ec2 describe-vpc-endpoints \
    --filters "Name=vpc-id,Values=$VPC" \
    --query "VpcEndpoints[?State=='available' || State=='Available'].join(' ', [VpcEndpointType,
      to_string(PrivateDnsEnabled), ServiceName, join(' ', not_null(RouteTableIds, \`[]\`))])" \
    --output text | tr '\t' '\n') || ENDPOINTS=unknown
}

# has_way SUBNET: an instance in it reaches SQS, Auto Scaling and S3 at the IPv4 addresses at which it asks for them.
has_way() {
  local way=${WAY_OF[${TABLE_OF[$1]}]}
  case $way in
    None) ;;
    igw-*) [[ ${GIVES_ADDRESS[$1]} != True ]] || return 0 ;;
    *) return 0 ;;
  esac
  [[ -z $(missing_endpoints "${TABLE_OF[$1]}") ]]
}

# missing_endpoints TABLE: those that an instance with this route table would need where it has no other way.
missing_endpoints() {
  local service
  local -a missing=()
  for service in sqs autoscaling; do
    [[ $ENDPOINTS =~ Interface\ true\ [a-z0-9.-]+\.$service( |$|$'\n') ]] || missing+=("$service (interface, with private DNS)")
  done
  has_gateway_endpoint "$1" || missing+=("s3 (gateway, in $1)")
  ((${#missing[@]} == 0)) || printf '%s, ' "${missing[@]}" | sed 's/, $//'
}

# has_gateway_endpoint TABLE: for S3.
has_gateway_endpoint() {
  grep -E '^Gateway \w+ [a-z0-9.-]+\.s3 ' <<<"$ENDPOINTS" | grep -qw -- "$1"
}

# remedy SUBNET: how it gets a way.
remedy() {
  local table=${TABLE_OF[$1]}
  printf 'give %s a default route (0.0.0.0/0) to a NAT or transit gateway that is there, or to an instance; without one, of endpoints is missing: %s' \
    "$table" "$(missing_endpoints "$table")"
}

# check_endpoint: the way to S3 that costs nothing, which is free without from a public subnet; and where endpoints are
# the only way, the one for the figures.
check_endpoint() {
  local table alone=no
  local -a without=()
  [[ $ENDPOINTS != unknown ]] || return 0
  for table in $ROUTE_TABLES; do
    has_gateway_endpoint "$table" || without+=("$table")
    [[ ${WAY_OF[$table]} != None ]] || alone=yes
  done
  ((${#without[@]} == 0)) \
    || warn "the fleet's subnets have no gateway endpoint for S3, so every model is paid for at the NAT gateway: aws ec2 create-vpc-endpoint --region $REGION --vpc-id $VPC --service-name com.amazonaws.$REGION.s3 --route-table-ids ${without[*]}"
  [[ $alone == no || $ENDPOINTS =~ Interface\ true\ [a-z0-9.-]+\.monitoring ]] \
    || warn "there is no interface endpoint for monitoring in $VPC, so the instances cannot publish their figures and the dashboard stays empty"
}

# remember_subnets ASKED: once the group is there, so that the next run need not be told.
remember_subnets() {
  local mark=named
  [[ $1 != auto ]] || mark=auto
  [[ -n $1 && $mark != "$SUBNETS_MARK" ]] || return 0
  change "note in the group $ASG_NAME where its subnets are from" aws autoscaling create-or-update-tags --tags \
    "ResourceId=$ASG_NAME,ResourceType=auto-scaling-group,Key=comfy-subnets,Value=$mark,PropagateAtLaunch=false"
}

#!/usr/bin/env bash
# Virtual hosts: N hosts, each with its own network, on one Linux machine. Needs no root. The hosts
# are gone when this script ends.
#
#   hosts.sh N [--rate 100mbit] -- COMMAND ...   run COMMAND on every host, output after "[host i] "
#   hosts.sh --check                             print whether virtual hosts work here, or a fix
#
# Hosts are named host0, host1, ... and resolve each other's names. COMMAND gets HOST, HOSTS,
# HOST_ADDRESS, FIRST_ADDRESS and GLOO_SOCKET_IFNAME in its environment. Lines on standard input
# control the hosts: `kill 1` kills host 1 and everything that runs on it, like a crash; `start 1`
# boots it again with the same COMMAND. Exits with 1 if the last run of COMMAND failed on any host.
set -u

die() { echo "hosts.sh: $*" >&2; exit 2; }

# Print the result of --check. Returns 0 if everything works, 3 if only --rate fails, else 1.
can() {
    local cannot="Virtual hosts are not available here:" tool said
    [ "$(uname)" = Linux ] || {
        echo "$cannot this is $(uname), and network namespaces need Linux." \
            "Use a Linux machine, or Linux in a virtual machine."
        return 1
    }
    for tool in unshare:util-linux nsenter:util-linux setpriv:util-linux \
        ip:iproute2 tc:iproute2 hostname:hostname; do
        command -v "${tool%:*}" > /dev/null || {
            echo "$cannot the command ${tool%:*} is missing. Install the package ${tool#*:}."
            return 1
        }
    done
    said=$("$BASH" "$0" 2 -- true 2>&1 < /dev/null) || {
        echo "$cannot user and network namespaces are forbidden (${said%%$'\n'*})." \
            "In a container, start it with --privileged; elsewhere ask for: sysctl" \
            "kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"
        return 1
    }
    said=$("$BASH" "$0" 2 --rate 1gbit -- true 2>&1 < /dev/null) || {
        echo "Virtual hosts work here, but their network cannot be slowed down" \
            "(${said%%$'\n'*}). Load the kernel module sch_tbf."
        return 3
    }
    echo "Virtual hosts work here, and their network can be slowed down."
}

# network HOST: connect the host's eth0 to the switch, limited to --rate in both directions.
network() {
    # A namespace lives as long as a process runs in it. This one survives kill and start.
    unshare --net sleep infinity & room[$1]=$!
    until [ "$(readlink "/proc/${room[$1]}/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do
        sleep 0.01
    done
    local inside="nsenter --target ${room[$1]} --net"
    ip link add "cable$1" type veth peer name eth0 netns "${room[$1]}" &&
        ip link set "cable$1" master switch up &&
        $inside ip addr add "10.77.0.$(($1 + 1))/24" dev eth0 &&
        $inside ip link set eth0 up &&
        $inside ip link set lo up || exit 2
    [ -z "$rate" ] && return
    # The bucket's tokens pass without delay, so the bucket must be small compared with a message.
    # A bucket that is too small would throttle a fast link below its rate.
    local bucket="root tbf rate $rate latency 100ms burst 4kb"
    [[ $rate = *gbit ]] && bucket=${bucket/4kb/16kb}
    tc qdisc add dev "cable$1" $bucket && $inside tc qdisc add dev eth0 $bucket || exit 2
}

# boot HOST: run COMMAND in a new PID namespace, where killing the first process kills all others.
boot() {
    HOST=$1 HOSTS=$count HOST_ADDRESS=10.77.0.$(($1 + 1)) FIRST_ADDRESS=10.77.0.1 \
        GLOO_SOCKET_IFNAME=eth0 nsenter --target "${room[$1]}" --net \
        unshare --uts --pid --fork --kill-child --mount-proc "$BASH" -c '
            hostname "host$HOST"
            "$@" 2>&1 < /dev/null | sed -u "s/^/[host $HOST] /"
            exit "${PIPESTATUS[0]}"' host "${command[@]}" &
    init[$1]=$!
}

# steer kill HOST, steer start HOST
steer() {
    local running=unknown
    [[ ${2:-} =~ ^[0-9]+$ && $2 -lt $count ]] &&
        { kill -0 "${init[$2]}" && running=yes || running=no; }
    case "${1:-} $running" in
        "kill yes") kill -KILL "${init[$2]}"; wait "${init[$2]}"; echo "[host $2] is killed" ;;
        "start no") echo "[host $2] starts"; boot "$2" ;;
        *) echo "hosts.sh: '$*' is not possible. Use 'kill HOST' for a host that is running, or" \
            "'start HOST' for one that is not. Hosts are 0 to $((count - 1))." ;;
    esac
}

# The first process in the namespaces: there is no network except the one that it creates.
inside() {
    local names
    names=$(mktemp) || exit 2
    # PyTorch's store sees IPv4 callers as ::ffff:ADDRESS and looks up their names.
    printf '127.0.0.1 localhost\n::ffff:127.0.0.1 localhost.v6\n' > "$names"
    for ((host = 0; host < count; host++)); do
        printf "%s host%s\n" "10.77.0.$((host + 1))" $host \
            "::ffff:10.77.0.$((host + 1))" $host.v6
    done >> "$names"
    mount --bind "$names" /etc/hosts && rm "$names" || exit 2
    ip link add switch type bridge && ip link set switch up && ip link set lo up || exit 2
    for ((host = 0; host < count; host++)); do network "$host"; done
    for ((host = 0; host < count; host++)); do boot "$host"; done
    local line="" part=""
    while kill -0 "${init[@]}"; do          # true while any host is running
        if read -r -t 0.1 part; then
            steer $line$part
            line=""
        elif (($? > 128)); then             # timeout: keep the first part of the line
            line+=$part
        else                                # end of input: read returns immediately
            sleep 0.1
        fi
    done 2> /dev/null                       # otherwise bash prints each killed command
    local failed=0
    for ((host = 0; host < count; host++)); do
        wait "${init[$host]}" 2> /dev/null || failed=1
    done
    exit $failed
}

usage="Usage: hosts.sh N [--rate 100mbit] -- COMMAND ..."
[ "${1:-}" = --check ] && { can; exit; }
here=("$@") within=${HOSTS_INSIDE:-}
unset HOSTS_INSIDE
count=${1:-} rate="" room=() init=()
[[ $count =~ ^[1-9][0-9]?$ ]] || die "the number of hosts is 1 to 99, not '$count'. $usage"
shift
[ "${1:-}" = --rate ] && {
    rate=${2:-}
    shift 2
    [[ $rate =~ ^[0-9]+[kmg]bit$ ]] || die "--rate must be a value such as 100mbit, not '$rate'"
}
[ "${1:-}" = -- ] && [ $# -ge 2 ] || die "a command is missing. $usage"
shift
command=("$@")
[ "$within" ] && inside
# With setpriv, the kernel kills unshare, and every process in it, when this script is killed.
HOSTS_INSIDE=yes setpriv --pdeathsig KILL \
    unshare --user --map-root-user --net --mount --uts --pid --fork --kill-child --mount-proc \
    "$BASH" "$0" "${here[@]}" <&0 &
world=$!
trap 'kill -KILL $world 2> /dev/null' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
wait $world

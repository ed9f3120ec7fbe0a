#!/usr/bin/env bash
# Virtual hosts: N hosts with a network of their own on one Linux machine, without root, gone when this script ends.
#
#   hosts.sh N [--rate 100mbit] -- COMMAND ...   runs COMMAND in each host at once; what it prints gets "[host i] " before it
#   hosts.sh --check                             says whether this machine can do it, and if not, why and the mend
#
# Hosts are called host0, host1, ... and know each other by name. COMMAND finds HOST, HOSTS, HOST_ADDRESS, FIRST_ADDRESS and
# GLOO_SOCKET_IFNAME in its environment. Lines on standard input steer them: `kill 1` ends host 1 with all that runs in it, as if it
# had crashed; `start 1` boots it again with the same COMMAND. Ends with 1 when the last run of COMMAND failed in any host.
set -u

die() { echo "hosts.sh: $*" >&2; exit 2; }

can() {     # the sentence of --check; 0: all works, 3: all but a limited rate, 1: nothing
    local cannot="Virtual hosts cannot be made here:" tool said
    [ "$(uname)" = Linux ] ||
        { echo "$cannot this is $(uname), and network namespaces are Linux's. Take a Linux machine, or Linux in a virtual machine."; return 1; }
    for tool in unshare:util-linux nsenter:util-linux setpriv:util-linux ip:iproute2 tc:iproute2 hostname:hostname; do
        command -v "${tool%:*}" > /dev/null || { echo "$cannot the command ${tool%:*} is missing. Install the package ${tool#*:}."; return 1; }
    done
    said=$("$BASH" "$0" 2 -- true 2>&1 < /dev/null) ||
        { echo "$cannot user and network namespaces are forbidden (${said%%$'\n'*})." \
        "In a container, start it with --privileged; elsewhere ask for: sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"; return 1; }
    said=$("$BASH" "$0" 2 --rate 1gbit -- true 2>&1 < /dev/null) ||
        { echo "Virtual hosts work here, but their network cannot be slowed down (${said%%$'\n'*})." \
        "Load the kernel module sch_tbf."; return 3; }
    echo "Virtual hosts work here, and their network can be slowed down."
}

network() {     # network HOST: a cable from its eth0 to the switch, as slow as --rate says in both directions
    unshare --net sleep infinity & room[$1]=$!         # a namespace lives as long as a process is in it; this one outlives kill and start
    until [ "$(readlink "/proc/${room[$1]}/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
    local inside="nsenter --target ${room[$1]} --net"
    ip link add "cable$1" type veth peer name eth0 netns "${room[$1]}" && ip link set "cable$1" master switch up &&
    $inside ip addr add "10.77.0.$(($1 + 1))/24" dev eth0 && $inside ip link set eth0 up && $inside ip link set lo up || exit 2
    [ -z "$rate" ] && return
    # a token bucket: what it holds passes at once, so it must be small beside a message; but small ones make a fast cable slow
    local bucket="root tbf rate $rate latency 100ms burst 4kb"; [[ $rate = *gbit ]] && bucket=${bucket/4kb/16kb}
    tc qdisc add dev "cable$1" $bucket && $inside tc qdisc add dev eth0 $bucket || exit 2
}

boot() {        # boot HOST: COMMAND in a process namespace of its own: its first process takes all others along when it dies
    HOST=$1 HOSTS=$count HOST_ADDRESS=10.77.0.$(($1 + 1)) FIRST_ADDRESS=10.77.0.1 GLOO_SOCKET_IFNAME=eth0 \
        nsenter --target "${room[$1]}" --net unshare --uts --pid --fork --kill-child --mount-proc \
        "$BASH" -c 'hostname "host$HOST"; "$@" 2>&1 < /dev/null | sed -u "s/^/[host $HOST] /"; exit "${PIPESTATUS[0]}"' host "${command[@]}" & init[$1]=$!
}

steer() {       # steer kill HOST, steer start HOST
    local lives=unknown
    [[ ${2:-} =~ ^[0-9]+$ && $2 -lt $count ]] && { kill -0 "${init[$2]}" && lives=yes || lives=no; }
    case "${1:-} $lives" in
        "kill yes") kill -KILL "${init[$2]}"; wait "${init[$2]}"; echo "[host $2] is killed" ;;
        "start no") echo "[host $2] starts"; boot "$2" ;;
        *) echo "hosts.sh: '$*' cannot be done: kill HOST that lives, start HOST that does not; hosts are 0 to $((count - 1))" ;;
    esac
}

inside() {      # runs as the first process of a world that has no other network than ours
    local names; names=$(mktemp) || exit 2
    printf '127.0.0.1 localhost\n::ffff:127.0.0.1 localhost.v6\n' > "$names"      # v6: how PyTorch's store sees callers; it asks for their names
    for ((host = 0; host < count; host++)); do printf "%s host%s\n" "10.77.0.$((host + 1))" $host "::ffff:10.77.0.$((host + 1))" $host.v6; done >> "$names"
    mount --bind "$names" /etc/hosts && rm "$names" || exit 2       # names without a name service
    ip link add switch type bridge && ip link set switch up && ip link set lo up || exit 2
    for ((host = 0; host < count; host++)); do network "$host"; done
    for ((host = 0; host < count; host++)); do boot "$host"; done
    local line="" part=""
    while kill -0 "${init[@]}"; do                                  # true while any of them lives
        if read -r -t 0.1 part; then
            steer $line$part; line=""
        elif (($? > 128)); then line+=$part                         # the time was over in the middle of a line
        else sleep 0.1; fi                                          # nobody steers: read returns at once
    done 2> /dev/null                                               # bash would print each command that was killed
    local failed=0
    for ((host = 0; host < count; host++)); do wait "${init[$host]}" 2> /dev/null || failed=1; done
    exit $failed
}

[ "${1:-}" = --check ] && { can; exit; }
here=("$@") within=${HOSTS_INSIDE:-}; unset HOSTS_INSIDE
count=${1:-} rate="" room=() init=()
[[ $count =~ ^[1-9][0-9]?$ ]] || die "the number of hosts is 1 to 99, not '$count'. Usage: hosts.sh N [--rate 100mbit] -- COMMAND ..."
shift
[ "${1:-}" = --rate ] && { rate=${2:-}; shift 2; [[ $rate =~ ^[0-9]+[kmg]bit$ ]] || die "--rate is such as 100mbit, not '$rate'"; }
[ "${1:-}" = -- ] && [ $# -ge 2 ] || die "a command is missing. Usage: hosts.sh N [--rate 100mbit] -- COMMAND ..."
shift; command=("$@")
[ "$within" ] && inside
# setpriv: when this script is killed, however hard, the kernel ends unshare, and with it every process in there
HOSTS_INSIDE=yes setpriv --pdeathsig KILL unshare --user --map-root-user --net --mount --uts --pid --fork --kill-child --mount-proc \
    "$BASH" "$0" "${here[@]}" <&0 & world=$!
trap 'kill -KILL $world 2> /dev/null' EXIT
trap 'exit 130' INT; trap 'exit 143' TERM
wait $world
